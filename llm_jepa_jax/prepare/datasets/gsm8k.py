# SPDX-License-Identifier: Apache-2.0
"""GSM8K: word problems of grade-school mathematics with worked answers (Cobbe et al., 2021)."""

from typing import Any

from llm_jepa_jax.prepare.dataset import DataSet, Layout, Line, Original, conversation, text_field
from llm_jepa_jax.prepare.rows import json_lines

SYSTEM = "Answer the math question, show steps."
URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"


def record(row: Any, where: str) -> Line:
    return conversation(SYSTEM, text_field(row, "question", where), text_field(row, "answer", where))


DATASET = DataSet(
    "gsm8k",
    licence="MIT",
    homepage="https://github.com/openai/grade-school-math",
    layouts=(Layout({"train": ("train.jsonl",), "test": ("test.jsonl",)}, json_lines, record),),
    originals=(
        Original(URL + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        Original(URL + "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ),
)
