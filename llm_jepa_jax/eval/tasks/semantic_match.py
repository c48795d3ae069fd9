# SPDX-License-Identifier: Apache-2.0
"""NL-RX, semantic match: answer and target describe the same strings (Locascio et al., 2016, "DFA-Equal")."""

from llm_jepa_jax.data.records import Record
from llm_jepa_jax.eval.regex_language import Arena, TooLarge
from llm_jepa_jax.eval.regex_parser import NotInDialect, parse
from llm_jepa_jax.eval.task import RIGHT, AnswerTask, Skip, Verdict, the_answer, undecided, unparsed, wrong

LONGEST_EXAMPLE = 80
"""Characters of a string that tells two languages apart that a reason shows."""


def target(record: Record) -> str:
    try:
        parse(the_answer(record), Arena())
    except NotInDialect as error:
        raise Skip("the target is not in the dialect") from error
    return the_answer(record)


def judge(answer: str, target: str) -> Verdict:
    if answer.strip() == target.strip():
        return RIGHT
    arena = Arena()
    wanted = parse(target, arena)
    try:
        found = parse(answer, arena)
        example = arena.difference(found, wanted)
    except NotInDialect as error:
        return unparsed(f"not in the dialect: {error}")
    except (TooLarge, RecursionError) as error:
        return undecided(f"too large to compare: {error}")
    return RIGHT if example is None else wrong(f"differs at {example[:LONGEST_EXAMPLE]!r}")


TASKS = (AnswerTask("semantic_match", "share of answers that describe the target's strings", judge, target=target),)
