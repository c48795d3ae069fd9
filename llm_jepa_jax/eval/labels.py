# SPDX-License-Identifier: Apache-2.0
"""Scoring of classification by what an answer begins with."""

import contextlib
from collections.abc import Iterator, Sequence

from llm_jepa_jax.config import EvalConfig
from llm_jepa_jax.data.records import Record
from llm_jepa_jax.eval.task import RIGHT, Judge, Verdict, the_answer, unparsed, wrong


def judge_label(answer: str, target: str, labels: Sequence[str]) -> Verdict:
    """The label that an answer begins with, the longest where several fit, is the target."""
    found = max((label for label in labels if answer.strip().startswith(label)), key=len, default=None)
    if found is None:
        return unparsed("begins with no label")
    return RIGHT if found == target.strip() else wrong(f"{found!r} is not {target.strip()!r}")


@contextlib.contextmanager
def label_session(config: EvalConfig, records: Sequence[Record]) -> Iterator[Judge]:
    """Labels are what the records have as targets."""
    labels = sorted({the_answer(record).strip() for record in records})
    yield lambda record, answer: judge_label(answer, the_answer(record), labels)
