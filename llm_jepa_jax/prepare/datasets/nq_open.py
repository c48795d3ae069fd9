# SPDX-License-Identifier: Apache-2.0
"""NQ-Open: questions to a search engine with short answers (Lee et al., 2019; EfficientQA, Min et al., 2020)."""

from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.dataset import DataSet, Drop, Layout, Line, Original, conversation, text_field
from llm_jepa_jax.prepare.rows import json_lines

SYSTEM = "Answer the question below."
SEPARATOR = "; "
"""Between gold answers, all of which are the target."""
URL = "https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open/"


def record(row: Any, where: str) -> Line:
    question = text_field(row, "question", where)
    answers = row.get("answer")
    if answers is None:
        raise Drop("no answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: `answer` must be a list of strings")
    return conversation(SYSTEM, question, SEPARATOR.join(answers))


DATASET = DataSet(
    "nq_open",
    licence="CC BY-SA 3.0",
    homepage="https://github.com/google-research-datasets/natural-questions/tree/master/nq_open",
    layouts=(
        Layout(
            {
                "train": ("NQ-open.train.jsonl",),
                "dev": ("NQ-open.dev.jsonl",),
                "test": ("NQ-open.efficientqa.test.1.1.jsonl",),
            },
            json_lines,
            record,
        ),
    ),
    originals=(
        Original(URL + "NQ-open.train.jsonl", "0c93aaf13b12f855628489665e4ef85ffb8573ad444646f11f4fabdc57a0aabf"),
        Original(URL + "NQ-open.dev.jsonl", "f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616"),
    ),
)
