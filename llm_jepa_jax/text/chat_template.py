# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's Jinja chat template: the text of a conversation, and where every content lies in it.

Contents are rendered twice, as they are and between marks, which tell where they have gone; both renderings must be
equal but for the marks. A template may strip white space from a content: marks lie inside of it, and a third rendering
without any tells how much was left.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.interface import Message
from llm_jepa_jax.text.thoughts import OPEN, split_thought

TODAY = datetime.datetime(2024, 7, 26)
"""The day that templates see: what Llama 3's take where they are given none. Rendering never depends on the clock."""
DATE = TODAY.strftime("%d %b %Y")
PLAIN = (
    "{{ bos_token | default('') }}{% for message in messages %}"
    "{{ message.role | capitalize + ':\\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"
    "{{ 'Assistant:\\n' if add_generation_prompt else '' }}"
)
"""`text.chat_template=plain`, for checkpoints without a template."""
MARKS = tuple("".join(chr(first + i) for i in range(5)) for first in range(0xFDD2, 0xFDEC, 5))
"""Characters that no text has (Unicode's noncharacters), in sets of five: a set that no content has is taken."""
Span = tuple[int, int]


class TemplateRefusal(UserError):
    """The template raised an exception."""


@dataclasses.dataclass(frozen=True)
class Laid:
    """A conversation's text."""

    text: str
    contents: tuple[Span, ...]
    """Characters of each message's content, as far as the template keeps it."""
    generation: tuple[Span, ...]
    """Characters of each `{% generation %}` block; blocks side by side are one."""
    dropped: tuple[int, ...] = ()
    """Messages whose thought the template leaves out: their content is the answer behind it."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what it holds, between marks if the rendering has some."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("between_marks", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def between_marks(self, context: Any, caller: Any) -> str:
        before, after = context.get("generation_marks", ("", ""))
        return before + caller() + after


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it; sandboxed, as they come with checkpoints."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
    return environment


class ChatTemplate:
    """One template with the special tokens it sees."""

    def __init__(self, source: str, origin: str, special_tokens: dict[str, str]):
        self.origin = origin
        self._variables = {"tools": None, "documents": None, "enable_thinking": False, "date_string": DATE}
        self._variables |= special_tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{origin}: not a chat template: line {error.lineno}: {error.message}") from error
        self.folds_system = self._folds_system()
        """System turns go into the user turn behind them: the template refuses them, or leaves them out."""

    def _folds_system(self) -> bool:
        probe = [{"role": "system", "content": "instruction"}, {"role": "user", "content": "question"}]
        try:
            return "instruction" not in self.render(probe)
        except TemplateRefusal:
            self.render(probe[1:])  # else it refuses everything
            return True

    def render(self, messages: list[dict[str, str]], prompt: bool = False, marks: str = "") -> str:
        """The text of a conversation; with `prompt` and what opens an answer, with `marks` around generation blocks.

        Raises:
            TemplateRefusal: the template raises an exception.
        """
        around = {"generation_marks": tuple(marks[3:])} if marks else {}
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **self._variables, **around)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateRefusal(f"{self.origin}: the chat template refuses the turns {roles}: {error}") from error

    def lay(self, messages: Sequence[Message], prompt: bool = False) -> Laid:
        """The text of a conversation, and where its contents lie; with `prompt` and what opens an answer.

        Raises:
            UserError: the template refuses it, or uses a content otherwise than by putting it somewhere.
        """
        contents = [message.content for message in messages]
        marks = next((marks for marks in MARKS if not any(set(marks) & set(content) for content in contents)), None)
        if marks is None:
            raise UserError("the contents hold every noncharacter from U+FDD2 to U+FDEF; take them out")
        parts = [split_thought(m.content) if m.role == "assistant" else None for m in messages]
        cores = [part.answer if part else content.strip() for part, content in zip(parts, contents, strict=True)]
        between = [_marked(marks, i, core) for i, core in enumerate(cores)]
        outer = [_outer(content, core) for content, core in zip(contents, cores, strict=True)]
        for i, part in enumerate(parts):
            if part:  # the thought is a content of its own, which templates may leave out; an empty one is none
                thought = _marked(marks, len(messages) + i, part.thought) if part.thought else ""
                between[i] = f"{part.opening}{thought}{part.closing}{between[i]}"
                outer[i] = "", part.rest
        marked = [before + text + after for (before, after), text in zip(outer, between, strict=True)]
        rendered = self.render(self._turns(messages, marked), prompt, marks)
        text, spans, generation, thoughts = self._read_marks(rendered, marks, messages)
        if text != self.render(self._turns(messages, contents), prompt):
            self._refuse_use(messages)
        if any(before or after for before, after in outer):
            bare = self.render(self._turns(messages, between), prompt, marks)
            spans = _with_outer((text, spans), self._read_marks(bare, marks, messages)[:2], outer)
        dropped = []
        for i, part in enumerate(parts):
            if part and i in thoughts:
                spans[i] = self._opening(text, thoughts[i], messages, i), spans[i][1]
            elif part and part.thought:
                dropped.append(i)
        return Laid(text, tuple(spans), tuple(generation), tuple(dropped))

    def _opening(self, text: str, thought: int, messages: Sequence[Message], number: int) -> int:
        """The character where a thought's `<think>` begins, given that of the thought."""
        place = text.rfind(OPEN, 0, thought)
        if place < 0 or text[place + len(OPEN) : thought].strip():
            self._refuse_turn(messages, number, f"with no {OPEN} before its thought")
        return place

    def _turns(self, messages: Sequence[Message], contents: list[str]) -> list[dict[str, str]]:
        """Messages as templates take them; a system turn folded where it must be, with a blank line behind it."""
        turns = [{"role": m.role, "content": content} for m, content in zip(messages, contents, strict=True)]
        if not self.folds_system or turns[0]["role"] != "system":
            return turns
        if len(turns) < 2 or turns[1]["role"] != "user":
            raise UserError(f"{self.origin}: the chat template has no system turn, and no user turn is behind it")
        return [{"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]

    def _read_marks(
        self, rendered: str, marks: str, messages: Sequence[Message]
    ) -> tuple[str, list[Span], list[Span], dict[int, int]]:
        """The rendering without marks, and what they say: contents by message, generation blocks, and where the
        thoughts begin that are kept."""
        text, found, blocks = "", {}, []
        for part in re.split(f"([{marks[0]}{marks[2]}]\\d+{marks[1]}|[{marks[3:]}])", rendered):
            if not part or part[0] not in marks:
                text += part
            elif part[0] in marks[3:]:
                blocks.append(len(text))
            elif part in found:
                self._refuse_turn(messages, int(part[1:-1]) % len(messages), "more than once")
            else:
                found[part] = len(text)
        spans = []
        for i in range(len(messages)):
            first, end = (found.get(f"{mark}{i}{marks[1]}") for mark in (marks[0], marks[2]))
            if first is None or end is None:
                self._refuse_turn(messages, i, "not as a whole")
            spans.append((first, end))
        inner = [place for place, again in zip(blocks[1:-1:2], blocks[2::2], strict=True) if place == again]
        blocks = [place for place in blocks if place not in inner]
        thoughts = {
            i: found[start] for i in range(len(messages))
            if (start := f"{marks[0]}{len(messages) + i}{marks[1]}") in found
        }  # fmt: skip
        return text, spans, list(zip(blocks[::2], blocks[1::2], strict=True)), thoughts

    def _refuse_turn(self, messages: Sequence[Message], number: int, how: str) -> NoReturn:
        raise UserError(
            f"{self.origin}: the chat template renders the content of turn {number} ({messages[number].role}) {how}: "
            f"{messages[number].content[:40]!r}; change that content or the template"
        )

    def _refuse_use(self, messages: Sequence[Message]) -> NoReturn:
        """Names the turn whose content the template reads rather than renders."""
        for number in range(1, len(messages)):
            if messages[number - 1].role == "assistant":
                self.lay(messages[:number])  # raises if the turn is among them
        self._refuse_turn(messages, len(messages) - 1, "differently for what it says")


def _marked(marks: str, number: int, core: str) -> str:
    return f"{marks[0]}{number}{marks[1]}{core}{marks[2]}{number}{marks[1]}"


def _outer(content: str, core: str) -> tuple[str, str]:
    """White space around a content."""
    before = content[: len(content) - len(content.lstrip())] if core else content
    return before, content[len(before) + len(core) :]


def _with_outer(full: tuple[str, list[Span]], bare: tuple[str, list[Span]], outer: list[tuple[str, str]]) -> list[Span]:
    """Spans widened by the white space that the template has kept, given the text with it and the text without any.

    Between two contents lie what is left of the white space behind the first, what the template puts there, and what is
    left of the white space before the second.
    """
    order = sorted(range(len(outer)), key=lambda i: full[1][i])
    if order != sorted(range(len(outer)), key=lambda i: bare[1][i]):
        raise UserError("the chat template orders turns by white space in their contents")
    spans = [list(span) for span in full[1]]
    for before, after in zip([None, *order], [*order, None], strict=True):
        gap, fixed = (
            text[0 if before is None else spans_[before][1] : None if after is None else spans_[after][0]]
            for text, spans_ in (full, bare)
        )
        trail = "" if before is None else outer[before][1]
        lead = "" if after is None else outer[after][0]
        extra = len(gap) - len(fixed)
        kept = [p for p in range(len(trail) + 1) if 0 <= extra - p <= len(lead)]
        kept = [p for p in kept if gap == trail[:p] + fixed + lead[len(lead) - (extra - p) :]]
        if len(kept) != 1:
            turn = after if before is None else before
            raise UserError(f"it cannot be told how much white space the chat template keeps around turn {turn}")
        if before is not None:
            spans[before][1] += kept[0]
        if after is not None:
            spans[after][0] -= extra - kept[0]
    return [(start, end) for start, end in spans]
