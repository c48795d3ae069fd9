# SPDX-License-Identifier: Apache-2.0
"""SentencePiece tokenizers with reserved ids for chat roles and predictor tokens, and finding any tokenizer."""

import functools
import hashlib
import io
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import sentencepiece

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.objective_config import NUM_RESERVED_PREDICTORS
from llm_jepa_jax.text.checkpoint_files import CHECKPOINT_DIRECTORY, write_whole
from llm_jepa_jax.text.interface import Message, Tokenizer, Turn, View
from llm_jepa_jax.text.pretrained import load_pretrained
from llm_jepa_jax.text.published_files import files_of_ours

PAD, UNKNOWN, BOS, END_OF_TURN = "<|pad|>", "<|unknown|>", "<|begin|>", "<|end_of_turn|>"
ROLE_PIECES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
PREDICTOR_PIECES = tuple(f"<|predictor_{i}|>" for i in range(1, NUM_RESERVED_PREDICTORS + 1))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + eos_token }}"
    "{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"
)
"""The chat format as Jinja, for an export."""
CONTROL_PIECES = (BOS, END_OF_TURN, *ROLE_PIECES.values(), *PREDICTOR_PIECES)
MODEL_FILE = "tokenizer.model"
"""Its name in a run's directory."""
NUM_BYTES = 256
MAX_SENTENCE_BYTES = 1 << 16
SETTINGS_VERSION = "1"
"""Changes when training settings below do, so that cached tokenizers are trained anew."""


class ReservedTokenizer(Tokenizer):
    """A SentencePiece model with pieces of ours: `<bos>`, then `<role> content <end-of-turn>` for every turn.

    Text encodes without loss: unknown characters fall back to bytes, and nothing is normalised.
    """

    def __init__(self, model: bytes, origin: str = "tokenizer"):
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{origin}: not a SentencePiece model; pass a .model file made by SentencePiece") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.pad_id = self._reserved(PAD, origin)
        self.bos_id = self._reserved(BOS, origin)
        self.end_of_turn_id = self._reserved(END_OF_TURN, origin)
        self.role_ids = {role: self._reserved(piece, origin) for role, piece in ROLE_PIECES.items()}
        self.mask_id = self._processor.unk_id()
        """Stands for a token taken out; with byte fallback no text encodes to it."""
        self.predictor_ids = tuple(self._reserved(piece, origin) for piece in PREDICTOR_PIECES)
        self.end_of_text_id, self.stop_ids, self.new_ids = self.end_of_turn_id, (self.end_of_turn_id,), ()

    def _reserved(self, piece: str, origin: str) -> int:
        index = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(index) != piece:
            raise UserError(
                f"{origin}: the reserved piece {piece} is missing; train with control_symbols="
                f"{','.join(CONTROL_PIECES)} and pad_piece={PAD}, leave text.tokenizer empty to train one here, or "
                "name a checkpoint's directory to use its own"
            )
        return index

    def __reduce__(self) -> tuple[type, tuple[bytes]]:
        return ReservedTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        found = self._processor.encode(text, out_type="offset_mapping")
        return found["ids"], [begin for begin, _ in found["offsets"]]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size and not self.is_control(int(i))])

    def piece(self, index: int) -> str:
        return self._processor.id_to_piece(int(index)).replace("▁", " ")

    @functools.cached_property
    def _control(self) -> frozenset[int]:
        size, processor = self.vocab_size, self._processor
        return frozenset(i for i in range(size) if processor.is_control(i) or processor.is_unknown(i))

    def is_control(self, index: int) -> bool:
        return index in self._control

    @property
    def forbidden_ids(self) -> frozenset[int]:  # type: ignore[override]
        return self._control - {self.end_of_turn_id}

    def turns(self, messages: Sequence[Message]) -> tuple[list[int], list[Turn]]:
        contents = self.encode_batch([message.content for message in messages])
        tokens, turns = [self.bos_id], []
        for message, content in zip(messages, contents, strict=True):
            start, end = len(tokens), len(tokens) + 1 + len(content)
            tokens += [self.role_ids[message.role], *content, self.end_of_turn_id]
            target = (start + 1, end + 1) if message.role == "assistant" else (end, end)
            turns.append(Turn(start, (start + 1, end), target))
        return tokens, turns

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return [*self.turns(messages)[0], self.role_ids["assistant"]]

    def view(self, role: str, content: str) -> View:
        return View([self.bos_id, self.role_ids[role], *self.encode(content)], 2)

    def turn_end(self, role: str) -> int:
        return self.end_of_turn_id

    def published_files(self, with_new: bool) -> dict[str, bytes]:
        names = {"bos_token": BOS, "eos_token": END_OF_TURN, "pad_token": PAD, "unk_token": UNKNOWN}
        return files_of_ours(self._model, names, TEMPLATE, self.published_ids())

    def published_ids(self) -> dict[str, int | list[int]]:
        return {"bos_token_id": self.bos_id, "eos_token_id": self.end_of_turn_id, "pad_token_id": self.pad_id}

    def save(self, directory: pathlib.Path) -> None:
        self.save_model(directory / MODEL_FILE)

    def save_model(self, path: pathlib.Path) -> None:
        """Writes the `.model` file whole or not at all."""
        write_whole(path, self._model)


def load_tokenizer(path: str | pathlib.Path, chat_template: str = "") -> Tokenizer:
    """The tokenizer of a checkpoint's directory, of a `tokenizer.json`, or of a `.model` file with pieces of ours.

    `chat_template` is a Jinja file, or `plain`, in place of the checkpoint's own template.

    Raises:
        UserError: nothing is there, files contradict each other, or a `.model` file lacks a reserved piece.
    """
    place = pathlib.Path(path).expanduser()
    if _holds_ours(place):
        place /= MODEL_FILE
    if place.is_dir() or place.suffix == ".json":
        return load_pretrained(place, chat_template)
    if chat_template:
        raise UserError(
            f"config: `text.chat_template`={chat_template} beside `text.tokenizer`={path}: a .model file with reserved "
            "pieces has its own chat format; leave the template out"
        )
    try:
        return ReservedTokenizer(place.read_bytes(), str(path))
    except OSError as error:
        raise UserError(
            f"text.tokenizer={path}: {error.strerror}; pass a checkpoint's directory, its tokenizer.json, or a "
            "SentencePiece .model file"
        ) from error


def has_tokenizer(directory: pathlib.Path) -> bool:
    """Whether the directory of a published model holds a tokenizer."""
    return any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def _holds_ours(place: pathlib.Path) -> bool:
    """Whether a directory's tokenizer is a `.model` file with pieces of ours; an export has a `tokenizer.json` too."""
    model = place / MODEL_FILE
    return model.is_file() and PREDICTOR_PIECES[0].encode() in model.read_bytes()


def saved_tokenizer(directory: pathlib.Path) -> Tokenizer | None:
    """The tokenizer that a run's directory holds, if it holds one.

    Raises:
        UserError: it cannot be read.
    """
    for name in (MODEL_FILE, CHECKPOINT_DIRECTORY):
        if (directory / name).exists():
            return load_tokenizer(directory / name)
    return None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> ReservedTokenizer:
    """Trains byte-fallback BPE on `texts`; same texts and size give the same bytes.

    Raises:
        UserError: `vocab_size` is too small for the reserved pieces or larger than the texts support.
    """
    reserved = NUM_BYTES + len(CONTROL_PIECES) + 2
    if vocab_size <= reserved:
        raise UserError(
            f"config: `text.vocab_size`={vocab_size} must be above {reserved}, the reserved and byte pieces"
        )
    model = io.BytesIO()
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "num_threads": 1,
        "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3,
        "pad_piece": PAD, "unk_piece": UNKNOWN, "bos_piece": BOS, "eos_piece": END_OF_TURN,
        "control_symbols": list(CONTROL_PIECES[2:]),
        "max_sentence_length": MAX_SENTENCE_BYTES,
        "input_sentence_size": 2_000_000,
        "shuffle_input_sentence": False,
        "minloglevel": 2,
    }  # fmt: skip
    wrong: list[UserError] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, wrong), model_writer=model, **options
        )
    except RuntimeError as error:
        if wrong:
            raise wrong[0] from None
        largest = re.search(r"<= (\d+)", str(error))
        fix = f"use at most {largest[1]}" if largest else "use a smaller one or more text"
        raise UserError(f"config: `text.vocab_size`={vocab_size} is too large for this text; {fix}") from error
    return ReservedTokenizer(model.getvalue())


def _sentences(texts: Iterable[str], wrong: list[UserError]) -> Iterator[str]:
    """Lines of `texts`; refusals go to `wrong` too, as SentencePiece hides its iterator's errors."""
    try:
        for text in texts:
            yield from _lines(text)
    except UserError as error:
        wrong.append(error)
        raise


def _lines(text: str) -> Iterable[str]:
    """Pieces of at most the trainer's longest sentence, so that nothing is skipped in silence."""
    step = MAX_SENTENCE_BYTES // 4  # a character has at most four bytes
    for line in text.splitlines():
        yield from (line[i : i + step] for i in range(0, len(line), step))


def cached_tokenizer(
    texts: Callable[[], Iterable[str]], content_hash: str, vocab_size: int, cache_dir: pathlib.Path
) -> Tokenizer:
    """The tokenizer for a content and a size, trained at first use and kept in `cache_dir`."""
    name = hashlib.sha256(f"{content_hash} {vocab_size} {SETTINGS_VERSION}".encode()).hexdigest()[:32]
    path = cache_dir / "tokenizers" / f"{name}.model"
    if path.exists():
        return load_tokenizer(path)
    tokenizer = train_tokenizer(texts(), vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(path)
    return tokenizer
