# SPDX-License-Identifier: Apache-2.0
"""HellaSwag: the most probable of the letters that the question offers is the target (Zellers et al., 2019)."""

import re
import string

from llm_jepa_jax.data.records import Record
from llm_jepa_jax.eval.task import ChoiceTask, Skip, the_answer

OPTION = re.compile(r"^([A-Z])\) ", re.MULTILINE)


def options(record: Record) -> tuple[str, ...]:
    """The letters that begin a line of the question as `A) …`, the last such list in it."""
    letters = OPTION.findall(record.messages[-2].content)
    first = len(letters) - letters[::-1].index("A") - 1 if "A" in letters else len(letters)
    offered = tuple(letters[first:])
    if len(offered) < 2 or offered != tuple(string.ascii_uppercase[: len(offered)]):
        raise Skip("the question has no lines `A) …`, `B) …`")
    if the_answer(record).strip() not in offered:
        raise Skip("the target is none of the letters offered")
    return offered


TASKS = (ChoiceTask("hellaswag", "share of questions whose most probable letter is right", options=options),)
