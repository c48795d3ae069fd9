# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tokenizer through `tokenizers`, in which control tokens have spellings that no text has.

A control token written in a message is then text like any other, while the template's own control tokens are spelled
anew before they are encoded: everything is encoded in one go, so ids are those of the original.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.checkpoint_files import CONFIG, TOKENIZER, CheckpointFiles
from llm_jepa_jax.text.from_sentencepiece import convert_sentencepiece

SPELLED = re.compile("\ufdd0\\d+\ufdd1")


def spelling(index: int) -> str:
    """How a control token is spelled inside: Unicode's noncharacters, which no text has."""
    return f"\ufdd0{index}\ufdd1"


def read_tokenizer_json(files: CheckpointFiles) -> dict[str, Any]:
    """The parsed `tokenizer.json`, or the same made from `tokenizer.model`, with what `tokenizer_config.json` adds.

    Raises:
        UserError: a file is not what it should be.
    """
    value = files.json(TOKENIZER) if TOKENIZER in files.contents else convert_sentencepiece(files)
    if not isinstance(value.get("model"), dict) or "vocab" not in value["model"]:
        raise UserError(f"{files.origin}/{TOKENIZER}: has no `model.vocab`; it is no tokenizer of `tokenizers`")
    added = value["added_tokens"] = list(value.get("added_tokens") or [])
    known = {token["id"] for token in added}
    for index, token in sorted(
        files.json(CONFIG).get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])
    ):
        if int(index) not in known:
            added.append({"normalized": False, "special": False, **_flags(token), "id": int(index)})
    return value


def _flags(token: dict[str, Any]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return flags | {name: value for name, value in token.items() if name != "__type"}


def vocabulary_of(value: dict[str, Any]) -> dict[str, int]:
    """Ids by piece, added tokens included."""
    vocab = value["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
    return pieces | {token["content"]: token["id"] for token in value["added_tokens"]}


class TemplateTokens(NamedTuple):
    """A template's text as n tokens."""

    ids: list[int]
    begins: np.ndarray
    """int64 [n]: the character of `spelled` that each token begins with."""
    ends: np.ndarray
    """int64 [n]: the character behind its last one."""
    spelled: str
    """The text with control tokens under their inner spelling."""
    places: np.ndarray
    """int64 [characters + 1]: where each character of the text is in `spelled`."""


class FastTokenizer:
    """Text to ids and back, with places."""

    def __init__(self, value: dict[str, Any], vocabulary: dict[str, int], control: set[str], origin: str):
        """`control` are the pieces that no text may encode to; `value` is changed.

        Raises:
            UserError: `tokenizers` cannot read it, or gives control tokens other ids.
        """
        self._ids = {piece: vocabulary[piece] for piece in control}
        # The longest first, as they are found.
        ordered = sorted(control, key=lambda piece: (-len(piece), piece))
        self.control = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        """Finds them in text."""
        _respell(value, self._ids)
        # Nothing is added to a text, cut off or padded; offsets are those of the text, spaces included.
        value |= {"post_processor": None, "truncation": None, "padding": None}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(value))
        except Exception as error:  # `tokenizers` raises no narrower class
            name = f"{origin}/{TOKENIZER}"
            raise UserError(
                f"{name}: `tokenizers` cannot read it ({error}); copy it anew from the checkpoint"
            ) from error
        for piece, index in self._ids.items():
            if self._tokenizer.token_to_id(spelling(index)) != index:
                raise UserError(f"{origin}/{TOKENIZER}: {piece!r} is id {index} in one place and another elsewhere")

    def encode_template(self, text: str, contents: Sequence[tuple[int, int]]) -> "TemplateTokens":
        """The ids of a template's text, whose control tokens are those outside of `contents`.

        Raises:
            UserError: a content holds a control token's inner spelling.
        """
        parts, place, longer = [], 0, np.zeros(len(text) + 1, np.int64)
        for start, end in [*sorted(contents), (len(text), len(text))]:
            for match in self.control.finditer(text, place, start):
                parts += [text[place : match.start()], spelling(self._ids[match[0]])]
                place = match.end()
                longer[place] += len(parts[-1]) - len(match[0])
            parts += [text[place:start], text[start:end]]
            self.check(parts[-1])
            place = end
        spelled = "".join(parts)
        ids, offsets = self.encode(spelled)
        bounds = np.array(offsets, np.int64).reshape(-1, 2)
        return TemplateTokens(ids, bounds[:, 0], bounds[:, 1], spelled, np.arange(len(text) + 1) + np.cumsum(longer))

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the (first, last + 1) character of each."""
        (encoded,) = self._encode([text])
        return encoded.ids, encoded.offsets

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts.

        Raises:
            UserError: a text holds a control token's inner spelling.
        """
        for text in texts:
            self.check(text)
        return [encoded.ids for encoded in self._encode(texts)]

    def _encode(self, texts: list[str]) -> list[tokenizers.Encoding]:
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    @staticmethod
    def check(text: str) -> None:
        """Refuses text that would be read as a control token."""
        found = SPELLED.search(text)
        if found:
            raise UserError(f"a text holds {found[0]!r}, which is made of noncharacters of Unicode; take them out")

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def piece(self, index: int) -> str | None:
        return self._tokenizer.id_to_token(index)


def _respell(value: dict[str, Any], ids: dict[str, int]) -> None:
    """Control tokens under their inner spelling, wherever the file has them."""
    added, model = value["added_tokens"], value["model"]
    for token in added:
        if token["content"] in ids:
            token |= {"content": spelling(token["id"]), "special": True}
    listed = {token["id"] for token in added}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added += [{"id": i, "content": spelling(i), **flags} for i in sorted(ids.values()) if i not in listed]
    added.sort(key=lambda token: token["id"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spelling(ids[p]) if p in ids else p: i for p, i in model["vocab"].items()}
    else:
        model["vocab"] = [[spelling(ids[p]) if p in ids else p, score] for p, score in model["vocab"]]
    if model.get("unk_token") in ids:
        model["unk_token"] = spelling(ids[model["unk_token"]])
