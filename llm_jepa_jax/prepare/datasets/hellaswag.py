# SPDX-License-Identifier: Apache-2.0
"""HellaSwag: which of four endings goes on (Zellers et al., 2019). The published test set has no labels."""

from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.dataset import DataSet, Drop, Layout, Line, Original, conversation, text_field
from llm_jepa_jax.prepare.rows import json_lines

SYSTEM = "Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D."
LETTERS = "ABCD"
URL = "https://github.com/rowanz/hellaswag/raw/master/data/"


def record(row: Any, where: str) -> Line:
    """The context with its endings is the question, a letter the answer; the views are context and right ending."""
    context, endings, label = text_field(row, "ctx", where), row.get("endings"), row.get("label")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) for e in endings):
        raise UserError(f"{where}: `endings` must be a list of four strings")
    if label in (None, ""):
        raise Drop("no label")
    if str(label) not in ("0", "1", "2", "3"):
        raise UserError(f"{where}: `label`={label!r}; 0 to 3 say which ending is right")
    if not all(ending.strip() for ending in endings):
        raise Drop("blank ending")
    question = "\n".join([context, *(f"{letter}) {ending}" for letter, ending in zip(LETTERS, endings, strict=True))])
    return conversation(SYSTEM, question, LETTERS[int(label)], text=context, code=endings[int(label)])


DATASET = DataSet(
    "hellaswag",
    licence="MIT",
    homepage="https://github.com/rowanz/hellaswag",
    layouts=(Layout({"train": ("hellaswag_train.jsonl",), "dev": ("hellaswag_val.jsonl",)}, json_lines, record),),
    originals=(
        Original(URL + "hellaswag_train.jsonl", "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d"),
        Original(URL + "hellaswag_val.jsonl", "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    ),
)
