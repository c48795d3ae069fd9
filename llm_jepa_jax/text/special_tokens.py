# SPDX-License-Identifier: Apache-2.0
"""Which ids of a checkpoint's tokenizer begin, end and pad, and which become predictor tokens."""

import dataclasses
import json
import re
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.objective_config import NUM_RESERVED_PREDICTORS
from llm_jepa_jax.text.checkpoint_files import CONFIG, GENERATION, RECORD, CheckpointFiles

RESERVED = (
    r"<\|reserved_special_token_(\d+)\|>",  # Llama 3
    r"<unused(\d+)>",  # Gemma
    r"\[unused(\d+)\]",
    r"<\|extra_id_(\d+)\|>",  # OLMo 2
    r"\[control_(\d+)\]",  # Mistral
    r"<SPECIAL_(\d+)>",
    r"<\|(?:dummy|placeholder|reserved|unused|extra)_?(\d+)\|>",
)
"""Spellings of tokens that a vocabulary keeps for its users, by family."""

MASK = "<|predictor_mask|>"
"""How a new token that stands for one taken out is spelled."""
OURS = re.compile(r"<\|predictor_(\d+|mask)\|>")
"""Spellings of new tokens, which the files of an export know."""


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Ids for predictor tokens and for a token taken out: reserved ones of the vocabulary, or new ones behind it."""

    predictor_ids: tuple[int, ...]
    mask_id: int
    new_ids: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return *self.predictor_ids, self.mask_id

    @property
    def spellings(self) -> dict[int, str]:
        """How new tokens are written where they are shown, and in the files of an export."""
        named = {index: f"<|predictor_{i}|>" for i, index in enumerate(self.predictor_ids, start=1)}
        return {index: named.get(index, MASK) for index in self.new_ids}

    def record(self) -> bytes:
        """What is kept beside the tokenizer's files, so that a choice once made stays."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()


def allocate(files: CheckpointFiles, vocabulary: dict[str, int], in_use: set[int], text_in_use: str) -> Allocation:
    """The recorded choice; else the first reserved tokens of one family that nothing uses, in the order of their
    numbers; else new ids.

    `in_use` are ids that have a meaning, `text_in_use` is where a reserved token may be spelled: the chat template.

    Raises:
        UserError: the record does not fit the vocabulary.
    """
    size, count = max(vocabulary.values()) + 1, NUM_RESERVED_PREDICTORS + 1
    if RECORD in files.contents:
        return _recorded(files, size, count)
    for family in RESERVED:
        numbered = ((re.fullmatch(family, piece), index) for piece, index in vocabulary.items())
        free = sorted(
            (int(match[1]), index)
            for match, index in numbered
            if match and index not in in_use and match[0] not in text_in_use
        )
        if len(free) >= count:
            ids = [index for _, index in free[:count]]
            return Allocation(tuple(ids[:-1]), ids[-1], ())
    ids = list(range(size, size + count))
    return Allocation(tuple(ids[:-1]), ids[-1], tuple(ids))


def _recorded(files: CheckpointFiles, size: int, count: int) -> Allocation:
    value = files.json(RECORD)
    try:
        found = Allocation(tuple(value["predictor_ids"]), value["mask_id"], tuple(value["new_ids"]))
        good = len(set(found.ids)) == count and all(0 <= i < size or i in found.new_ids for i in found.ids)
        good &= set(found.new_ids) in (set(), set(range(size, size + count)))
    except (KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"{files.origin}/{RECORD}: not of this vocabulary of {size} tokens; remove it to choose anew")
    return found


@dataclasses.dataclass(frozen=True)
class Ends:
    """Ids with a meaning, as the checkpoint's files say them."""

    bos_id: int
    """Before plain text: the beginning-of-sequence token, else what the model was configured with, else its end."""
    end_of_text_id: int
    pad_id: int
    stop_ids: tuple[int, ...]


def read_ends(files: CheckpointFiles, names: dict[str, str], vocabulary: dict[str, int]) -> Ends:
    """The ids of `names`, with those of `generation_config.json` or `config.json`.

    Raises:
        UserError: no end is named, or an id or a token is not in the vocabulary.
    """
    size = max(vocabulary.values()) + 1

    def named(name: str) -> list[int]:
        token = names.get(name)
        if token is not None and token not in vocabulary:
            raise UserError(f"{files.origin}/{CONFIG}: `{name}`={token!r} is not in the vocabulary of {size} tokens")
        return [vocabulary[token]] if token is not None else []

    def configured(name: str) -> list[int]:
        ids = files.ids(name)
        for index in ids:
            if not 0 <= index < size:
                raise UserError(
                    f"{files.origin}: `{name}`={index} of {GENERATION} or config.json is outside the tokenizer's "
                    f"{size} ids; these files are of different checkpoints"
                )
        return ids

    ends = named("eos_token") + configured("eos_token_id")
    if not ends:
        raise UserError(
            f"{files.origin}: nothing says which token ends a text; set `eos_token` in {CONFIG} "
            f"or `eos_token_id` in {GENERATION}"
        )
    # Nothing is told apart by the padding id: where a checkpoint has one outside its vocabulary, another will do.
    pads = [vocabulary[names["pad_token"]]] if names.get("pad_token") in vocabulary else []
    pads += [index for index in files.ids("pad_token_id") if 0 <= index < size]
    begins = named("bos_token") + configured("bos_token_id")
    return Ends((begins or ends)[0], ends[0], (pads or ends)[0], tuple(dict.fromkeys(ends)))


def special_pieces(value: dict[str, Any], names: dict[str, str]) -> set[str]:
    """Spellings of control tokens in a parsed `tokenizer.json`: added tokens that are marked so or have a name."""
    named = set(names.values())
    return {token["content"] for token in value["added_tokens"] if token.get("special") or token["content"] in named}


def adds_bos(files: CheckpointFiles, value: dict[str, Any]) -> bool:
    """Whether the checkpoint begins plain text with its beginning-of-sequence token: `add_bos_token`, or else the
    post-processor of the parsed `tokenizer.json`."""
    said = files.json(CONFIG).get("add_bos_token")
    return bool(said) if said is not None else '"SpecialToken"' in _single(value.get("post_processor") or {})


def _single(processor: dict[str, Any]) -> str:
    """What post-processors put around one text, as JSON up to that text."""
    parts = [processor, *processor.get("processors", [])]
    return "".join(json.dumps(part.get("single", [])).split('"Sequence"')[0] for part in parts)
