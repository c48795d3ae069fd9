# SPDX-License-Identifier: Apache-2.0
"""NQ-Open: one of the gold answers, which the target lists with `;` between them, is in the output (LLM-JEPA, 4.1)."""

import re
import unicodedata

from llm_jepa_jax.eval.task import RIGHT, AnswerTask, Verdict, unparsed, wrong

SEPARATOR = ";"


def plain(text: str) -> str:
    """Compatibility form (NFKC), case folded, white space as single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def holds(output: str, gold: str) -> bool:
    """Whether a gold answer stands in an output, both plain. A number does not stand in a longer one."""
    before = r"(?<!\d)(?<!\d[.,])" if gold[:1].isdigit() else ""
    behind = r"(?!\d)(?![.,]\d)" if gold[-1:].isdigit() else ""
    return re.search(before + re.escape(gold) + behind, output) is not None


def judge(answer: str, target: str) -> Verdict:
    output = plain(answer)
    if not output:
        return unparsed("the output is empty")
    golds = [gold for gold in map(plain, target.split(SEPARATOR)) if gold]
    return RIGHT if any(holds(output, gold) for gold in golds) else wrong("no gold answer is in the output")


def judge_as_published(answer: str, target: str) -> Verdict:
    """The published script's test is the other way round: a part of the output is in the target, so an empty output
    is right."""
    parts = answer.strip().split("; ")
    return RIGHT if any(part in target for part in parts) else wrong("no part of the output is in the target")


TASKS = (
    AnswerTask("nq_open", "share of outputs that hold a gold answer", judge),
    AnswerTask("nq_open_published", "share of outputs of which a part is in the target", judge_as_published),
)
