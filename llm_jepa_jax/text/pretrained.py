# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and chat template of a Hugging Face checkpoint, read without `transformers`."""

import dataclasses
import functools
import hashlib
import logging
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.chat_format import ANSWER, QUESTION, ChatFormat
from llm_jepa_jax.text.chat_template import PLAIN, ChatTemplate, Laid, Span
from llm_jepa_jax.text.checkpoint_files import (
    CHECKPOINT_DIRECTORY,
    MODEL_CONFIG,
    RECORD,
    TEMPLATE,
    CheckpointFiles,
    read_checkpoint_files,
    write_whole,
)
from llm_jepa_jax.text.fast_tokenizer import FastTokenizer, TemplateTokens, read_tokenizer_json, vocabulary_of
from llm_jepa_jax.text.interface import TOKEN_IDS, Message, Tokenizer, Turn, View
from llm_jepa_jax.text.published_files import with_added_tokens
from llm_jepa_jax.text.special_tokens import MASK, OURS, adds_bos, allocate, read_ends, special_pieces

LOG = logging.getLogger("llm_jepa_jax")
VERSION = "1"
"""Changes with what the same files are rendered to."""
NO_TEMPLATE = "no chat template for its turns; set text.chat_template to a Jinja file, or to `plain`"


class PretrainedTokenizer(Tokenizer):
    """Ids as `transformers` gives them, but for control tokens spelled in messages, which stay text here."""

    def __init__(self, files: CheckpointFiles):
        """Errors: `UserError` where files are missing, wrong, or contradict each other."""
        self.files = files
        value, names = read_tokenizer_json(files), files.special_tokens()
        begins_texts = adds_bos(files, value)
        vocabulary, template = vocabulary_of(value), files.chat_template()
        control = special_pieces(value, names)
        ends = read_ends(files, names, vocabulary)
        in_use = {ends.bos_id, ends.pad_id, *ends.stop_ids, *(vocabulary[n] for n in names.values() if n in vocabulary)}
        self.allocation = allocate(files, vocabulary, in_use, template)
        self.bos_id, self.pad_id, self.end_of_text_id = ends.bos_id, ends.pad_id, ends.end_of_text_id
        self.predictor_ids, self.new_ids = self.allocation.predictor_ids, self.allocation.new_ids
        self.mask_id = self.allocation.mask_id
        self.vocab_size = max(*vocabulary.values(), *self.allocation.ids) + 1
        self._pieces = {index: piece for piece, index in vocabulary.items()}
        self.forbidden_ids = frozenset(i for i in self.allocation.ids if OURS.fullmatch(self._pieces.get(i, MASK)))
        control |= {self._pieces[i] for i in self.allocation.ids if i in self._pieces}
        self._control_ids = frozenset(vocabulary[piece] for piece in control) | frozenset(self.allocation.ids)
        self._fast = FastTokenizer(value, vocabulary, control, files.origin)
        self.fingerprint = hashlib.sha256(f"{VERSION} {files.fingerprint} {self.allocation}".encode()).hexdigest()
        chat = ChatTemplate(template, files.origin, names) if template else None
        self._format = ChatFormat(chat, names.get("bos_token", ""), self._fast.control) if chat else None
        self.stop_ids = ends.stop_ids
        self._prefix = [ends.bos_id] if begins_texts else []
        if self._format:
            end = self._answer_end()
            self.stop_ids = (end, *(index for index in ends.stop_ids if index != end))

    def __reduce__(self) -> tuple[type, tuple[CheckpointFiles]]:
        return PretrainedTokenizer, (self.files,)

    def _answer_end(self) -> int:
        """The token that ends an answer; refuses a template that has none, and warns of one at odds with itself."""
        asked, trained = self._openings([QUESTION])
        if trained[: len(asked)] != asked:
            LOG.warning(
                "%s: the chat template opens an answer with %r where it asks for one, and with %r inside a "
                "conversation; prompts here end as conversations do",
                self.files.origin, *("".join(map(self.piece, ids)) for ids in (asked, trained)),
            )  # fmt: skip
        ids, turns = self.turns([QUESTION, ANSWER])
        (_, stop), (_, content_stop) = turns[1].target, turns[1].content
        if stop == content_stop or ids[stop - 1] not in self._control_ids:
            raise UserError(
                f"{self.files.origin}: the chat template ends an answer with {self.chat.tails['assistant']!r}, which "
                "is no control token: a model could not learn to stop; name another one with text.chat_template"
            )
        return ids[stop - 1]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._fast.encode_batch(list(texts))

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        self._fast.check(text)
        ids, offsets = self._fast.encode(text)
        return ids, [begin for begin, _ in offsets]

    def decode(self, ids: Iterable[int]) -> str:
        return self._fast.decode(int(i) for i in ids if int(i) in self._pieces and not self.is_control(int(i)))

    def piece(self, index: int) -> str:
        index = int(index)
        if index in self.allocation.spellings:
            return self.allocation.spellings[index]
        if index not in self._pieces or self.is_control(index):
            return self._pieces.get(index, f"<|{index}|>")
        text = self._fast.decode([index])
        # Decoders take a word's space away where it begins a text.
        return " " + text if self._pieces[index].startswith("▁") and not text.startswith(" ") else text

    def is_control(self, index: int) -> bool:
        return index in self._control_ids

    @property
    def chat(self) -> ChatFormat:
        """What the chat template does.

        Raises:
            UserError: there is none.
        """
        if self._format is None:
            raise UserError(f"{self.files.origin}: {NO_TEMPLATE}")
        return self._format

    def turns(self, messages: Sequence[Message]) -> tuple[list[int], list[Turn]]:
        laid = self.chat.template.lay(messages)
        if len(messages) - 1 in laid.dropped:
            raise UserError(
                f"{self.files.origin}: the chat template leaves out the thought of the last answer: "
                f"{messages[-1].content[:40]!r}; take thoughts out of the records, or name a template that keeps them "
                "with text.chat_template"
            )
        if laid.dropped:
            _say_dropped(self.files.origin)
        tokens = self._fast.encode_template(laid.text, laid.contents)
        turns: dict[int, Turn] = {}
        before = None
        for number in sorted(range(len(messages)), key=laid.contents.__getitem__):
            role, (start, end) = messages[number].role, laid.contents[number]
            content = self._content(tokens, (start, end), f"turn {number} ({role})")
            begin = tokens.places[self.chat.start_of(laid, role, start, before)]
            first = min(int(np.searchsorted(tokens.begins, begin)), content[0])
            target = self._target(tokens, laid, number, content) if role == "assistant" else (content[1], content[1])
            turns[number] = Turn(first, content, target)
            before = role, end
        return tokens.ids, [turns[number] for number in range(len(messages))]

    def _content(self, tokens: TemplateTokens, span: Span, where: str) -> Span:
        """The tokens of a content that lies at the characters `span` of the template's text.

        A token that reaches over an end of the content belongs to it if it holds more of it than white space.

        Raises:
            UserError: such a token holds more than white space of both.
        """
        begin, end = (int(tokens.places[place]) for place in span)
        inside = [int(np.searchsorted(tokens.ends, begin, "right")), int(np.searchsorted(tokens.begins, end))]
        for side, outward in ((0, 1), (1, -1)):
            edge = inside[side] - side
            if inside[0] >= inside[1]:
                break
            first, last = int(tokens.begins[edge]), int(tokens.ends[edge])
            if (first >= begin) if side == 0 else (last <= end):
                continue
            own, other = (
                tokens.spelled[max(first, begin) : min(last, end)],
                tokens.spelled[first:begin] if side == 0 else tokens.spelled[end:last],
            )
            if not own.strip():
                inside[side] += outward
            elif other.strip():
                raise UserError(
                    f"{self.files.origin}: one token, {tokens.spelled[first:last]!r}, is of the content of {where} and "
                    "of what the chat template puts beside it; change that content or the template"
                )
        return inside[0], max(inside)

    def _target(self, tokens: TemplateTokens, laid: Laid, number: int, content: Span) -> Span:
        """What of an answer is trained on: its `{% generation %}` block, or else its content with the control token
        that ends it."""
        start, end = laid.contents[number]
        if laid.generation:
            blocks = [block for block in laid.generation if block[0] <= start and end <= block[1]]
            if len(blocks) != 1:
                raise UserError(
                    f"{self.files.origin}: turn {number} (assistant) lies in {len(blocks)} generation blocks of the "
                    "chat template; it must be in one"
                )
            first, last = (int(tokens.places[place]) for place in blocks[0])
            return int(np.searchsorted(tokens.ends, first, "right")), int(np.searchsorted(tokens.begins, last))
        behind = tokens.places[self.chat.end_of(laid, "assistant", end)]
        for index in range(content[1], int(np.searchsorted(tokens.begins, behind))):
            if self.is_control(tokens.ids[index]):
                return content[0], index + 1
        return content

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Without a chat template, one user turn is plain text to go on with, begun as the checkpoint begins texts."""
        if self._format is None and [message.role for message in messages] == ["user"]:
            return [*self._prefix, *self.encode(messages[0].content)]
        asked, trained = self._openings(messages)
        return asked if trained[: len(asked)] == asked else trained

    def _openings(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """What opens an answer, the turns before it included: where the template asks for one, and in a conversation.

        They differ in templates that open a thought which no conversation of theirs holds.
        """
        laid = self.chat.template.lay(messages, prompt=True)
        asked = self._fast.encode_template(laid.text, laid.contents).ids
        ids, turns = self.turns([*messages, ANSWER])
        return asked, ids[: turns[-1].content[0]]

    def view(self, role: str, content: str) -> View:
        text, start, end = self.chat.view(role, content)
        tokens = self._fast.encode_template(text, [(start, end)])
        first, last = self._content(tokens, (start, end), f"a {role} view")
        return View(tokens.ids[:last], first)

    def turn_end(self, role: str) -> int:
        tail = self.chat.tails[role]
        ids, turns = self.turns([QUESTION] if role == "user" else [QUESTION, ANSWER])
        (_, stop) = turns[-1].content
        if stop == len(ids) or not self.is_control(ids[stop]):
            raise UserError(
                f"config: `objective.jepa.view_end`=turn: {self.files.origin}: the chat template has {tail!r} behind "
                f"{role} turns, which begins with no control token; use view_end=content"
            )
        return ids[stop]

    def published_files(self, with_new: bool) -> dict[str, bytes]:
        allocation, changed = self.allocation, {}
        if with_new and self.new_ids:
            changed = with_added_tokens(self.files, allocation.spellings, {*self._pieces.values()})
            allocation = dataclasses.replace(allocation, new_ids=())
        kept = {name: data for name, data in self.files.contents.items() if name != MODEL_CONFIG}
        return kept | changed | {RECORD: allocation.record()}

    def published_ids(self) -> dict[str, int | list[int]]:
        said = self.files.json(MODEL_CONFIG)
        return {name: said[name] for name in TOKEN_IDS if said.get(name) is not None}

    def save(self, directory: pathlib.Path) -> None:
        target = directory / CHECKPOINT_DIRECTORY
        self.files.save(target)
        write_whole(target / RECORD, self.allocation.record())


@functools.cache
def _say_dropped(origin: str) -> None:
    """Once."""
    LOG.info("%s: the chat template leaves thoughts out of answers before the last; they are not trained on", origin)


def load_pretrained(place: pathlib.Path, chat_template: str = "") -> PretrainedTokenizer:
    """The tokenizer of a checkpoint's directory or of a `tokenizer.json`; `chat_template` is a Jinja file or `plain`.

    Raises:
        UserError: files are missing, wrong, or contradict each other.
    """
    files = read_checkpoint_files(place)
    if chat_template:
        try:
            template = (
                PLAIN.encode() if chat_template == "plain" else pathlib.Path(chat_template).expanduser().read_bytes()
            )
        except OSError as error:
            raise UserError(
                f"config: `text.chat_template`={chat_template}: {error.strerror}; name a Jinja file, or `plain`"
            ) from error
        files = dataclasses.replace(files, contents=files.contents | {TEMPLATE: template})
    return PretrainedTokenizer(files)
