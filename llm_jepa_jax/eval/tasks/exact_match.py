# SPDX-License-Identifier: Apache-2.0
"""The answer is the target, outer white space aside: NL-RX as published, and the default for records of any kind."""

from llm_jepa_jax.eval.task import RIGHT, AnswerTask, Verdict, wrong


def judge(answer: str, target: str) -> Verdict:
    return RIGHT if answer.strip() == target.strip() else wrong()


TASKS = (AnswerTask("exact_match", "share of answers equal to the target", judge),)
