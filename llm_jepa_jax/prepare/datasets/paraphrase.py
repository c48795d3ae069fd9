# SPDX-License-Identifier: Apache-2.0
"""Paraphrases: the positive pairs of PAWS (Zhang et al., 2019), or of Quora Question Pairs, as published or in GLUE."""

from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.dataset import DRAWN_RULE, DataSet, Drop, Layout, Line, Original, Rows, text_field
from llm_jepa_jax.prepare.rows import separated, with_header
from llm_jepa_jax.prepare.source_files import SourceFile

COLUMNS = (("sentence1", "sentence2", "label"), ("question1", "question2", "is_duplicate"))
"""Of PAWS, and of Quora Question Pairs."""


def unquoted(file: SourceFile) -> Rows:
    """PAWS and GLUE: a quotation mark is a character like others."""
    return with_header(separated(file, "\t", quoted=False), file.origin)


def quoted(file: SourceFile) -> Rows:
    """Quora's own file."""
    return with_header(separated(file, "\t"), file.origin)


def record(row: dict[str, Any], where: str) -> Line:
    first, second, label = next((names for names in COLUMNS if names[0] in row), COLUMNS[0])
    pair = [text_field(row, name, where).strip() for name in (first, second)]
    if label not in row:
        raise Drop("no label")  # GLUE's test.tsv
    if row[label] not in ("0", "1"):
        raise UserError(f"{where}: `{label}`={row[label]!r}; 1 says that the two are paraphrases, 0 that they are not")
    if row[label] == "0":
        raise Drop("no paraphrase")
    if not all(pair):
        raise Drop("blank sentence")
    if pair[0] == pair[1]:
        raise Drop("the same sentence twice")
    return {"group": pair}


DATASET = DataSet(
    "paraphrase",
    licence="PAWS: free for any purpose, acknowledging Google LLC; Quora Question Pairs: Quora's terms of service",
    homepage="https://github.com/google-research-datasets/paws",
    layouts=(
        Layout({"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}, unquoted, record),
        Layout({"all": ("quora_duplicate_questions.tsv",)}, quoted, record, rule=DRAWN_RULE),
    ),
    originals=(
        Original(
            "https://storage.googleapis.com/paws/english/paws_wiki_labeled_final.tar.gz",
            "1aad6cbb8a90b15563a0c154752c2b2c8e3bc5bdaa125172214d598bc76bc9fd",
        ),
    ),
)
