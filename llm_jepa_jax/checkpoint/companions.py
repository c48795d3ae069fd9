# SPDX-License-Identifier: Apache-2.0
"""What stands beside an export's weights: tokenizer and generation files, licences, and how many rows are kept."""

import dataclasses
import json
import re
from typing import Any

from llm_jepa_jax.checkpoint.hf_directory import CONFIG, read_json
from llm_jepa_jax.checkpoint.places import Place
from llm_jepa_jax.text.interface import TOKEN_IDS, Tokenizer

GENERATION, CARD = "generation_config.json", "README.md"
LICENCE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([.-]\w+)?", re.IGNORECASE)
FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*\n", re.DOTALL)
LICENCE_FIELD = re.compile(r"(license(?:_name|_link)?):\s*(\S.*)")


@dataclasses.dataclass(frozen=True)
class Companions:
    """Files by name, and the token ids that `config.json` gives."""

    files: dict[str, bytes]
    token_ids: dict[str, Any]


def kept_rows(rows: int, tokenizer: Tokenizer | None, source: Place | None, predictor_rows: str) -> int:
    """Rows of the vocabulary that an export has.

    With `predictor_rows="drop"` those of predictor tokens that the checkpoint did not have are left out: the model
    has the checkpoint's number of rows again, or, where the checkpoint is not at hand, its tokenizer's. Reserved tokens
    of a vocabulary, and tokenizers trained here, have no row to drop.
    """
    if predictor_rows == "keep" or tokenizer is None or not tokenizer.new_ids:
        return rows
    known = read_json(source / CONFIG).get("vocab_size", 0) if source else 0
    return min(rows, max(min(tokenizer.new_ids), known))


def companions(tokenizer: Tokenizer | None, source: Place | None, with_new: bool) -> Companions:
    """Those of a model with this tokenizer; `source` is the published directory that its weights come from.

    `with_new` says that the model has trained rows for the tokenizer's new ids.
    """
    files, ids = {}, {}
    if source:
        files = {path.name: path.read_bytes() for path in source.iterdir() if LICENCE_FILE.fullmatch(path.name)}
    if tokenizer:
        files |= tokenizer.published_files(with_new)
        return Companions(_with_settings(files, source), tokenizer.published_ids())
    if source:
        said = read_json(source / CONFIG)
        ids = {name: said[name] for name in TOKEN_IDS if said.get(name) is not None}
        if (source / GENERATION).is_file():
            files[GENERATION] = (source / GENERATION).read_bytes()
    return Companions(files, ids)


def _with_settings(files: dict[str, bytes], source: Place | None) -> dict[str, bytes]:
    """Generation settings of the base where the tokenizer's file, which is not the base's, gives ids alone."""
    ours = json.loads(files.get(GENERATION, b"{}"))
    base = read_json(source / GENERATION) if source and (source / GENERATION).is_file() else {}
    if set(base) <= set(ours) or not set(ours) <= set(TOKEN_IDS):
        return files
    return files | {GENERATION: (json.dumps(base | ours, indent=2) + "\n").encode()}


def licence_fields(source: Place | None) -> list[str]:
    """The lines on the licence in the front matter of a published model's card, as they are there."""
    if source is None or not (source / CARD).is_file():
        return []
    matter = FRONT_MATTER.match((source / CARD).read_text(encoding="utf-8", errors="replace"))
    lines = matter[1].splitlines() if matter else []
    return [line.rstrip() for line in lines if LICENCE_FIELD.fullmatch(line.rstrip())]
