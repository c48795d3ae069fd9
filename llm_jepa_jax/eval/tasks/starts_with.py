# SPDX-License-Identifier: Apache-2.0
"""The answer begins with the target: the published score of pretraining, where a model may not have learnt to stop."""

from llm_jepa_jax.eval.task import RIGHT, AnswerTask, Verdict, wrong


def judge(answer: str, target: str) -> Verdict:
    return RIGHT if answer.strip().startswith(target.strip()) else wrong()


TASKS = (AnswerTask("starts_with", "share of answers that begin with the target", judge),)
