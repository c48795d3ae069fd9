# SPDX-License-Identifier: Apache-2.0
"""GSM8K: the number behind the last `####` of the answer equals that of the target (Cobbe et al., 2021)."""

import re
from fractions import Fraction

from llm_jepa_jax.data.records import Record
from llm_jepa_jax.eval.task import RIGHT, AnswerTask, Skip, Verdict, the_answer, unparsed, wrong

NUMBER = re.compile(
    r"(?P<sign>[-+−]?)\s*[$€£]?\s*(?P<whole>\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?P<part>\.\d+)?"
    r"(?![.,]?\d)(?!\s*[-−+*/^=×]\s*\d)"
)
"""A number with its sign and currency that does not go on as a longer one or as a formula."""
PUBLISHED = re.compile(r"\n#### (.+)$")


def final_number(text: str) -> Fraction | None:
    """The number right behind the last `####`, units aside; None where there is none."""
    _, mark, end = text.rpartition("####")
    found = NUMBER.match(end.strip()) if mark else None
    if not found:
        return None
    sign = "-" if found["sign"] in ("-", "−") else ""
    return Fraction(sign + (found["whole"].replace(",", "") or "0") + (found["part"] or ""))


def target(record: Record) -> str:
    if final_number(the_answer(record)) is None:
        raise Skip("the target has no number behind ####")
    return the_answer(record)


def judge(answer: str, target: str) -> Verdict:
    found, wanted = final_number(answer), final_number(target)
    if found is None:
        return unparsed("no number behind ####")
    return RIGHT if found == wanted else wrong(f"{found} is not {wanted}")


def judge_as_published(answer: str, target: str) -> Verdict:
    """The rest of the last line, behind a line break and `#### `, is the same text; the answer's must end it."""
    found, wanted = (PUBLISHED.search(text) for text in (answer.strip(), target))
    if not found or not wanted:
        return unparsed("no last line `#### …`")
    same = found.group(1) == wanted.group(1)
    return RIGHT if same else wrong(f"{found.group(1)!r} is not {wanted.group(1)!r}")


TASKS = (
    AnswerTask("gsm8k", "share of final numbers equal to the target's", judge, target=target),
    AnswerTask("gsm8k_published", "share of final lines equal to the target's, as text", judge_as_published),
)
