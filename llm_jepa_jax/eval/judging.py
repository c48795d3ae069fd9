# SPDX-License-Identifier: Apache-2.0
"""From what a model said about a task's records to verdicts, lines of the evaluation's file, and the score."""

import collections
import concurrent.futures
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jepa_jax.config import EvalConfig
from llm_jepa_jax.eval.likelihood import Question
from llm_jepa_jax.eval.questions import Asked, Item
from llm_jepa_jax.eval.scores import Score, judged, perplexity
from llm_jepa_jax.eval.task import RIGHT, AnswerTask, LikelihoodTask, Skip, Verdict, wrong
from llm_jepa_jax.text.thoughts import without_thought

Answers = Mapping[tuple[int, ...], tuple[str, bool]]
"""By prompt: the answer's text, and whether it ended by itself."""
Slots = Mapping[tuple[int, ...], Mapping[tuple[int, int], float]]
"""By sequence, then by place and token: the token's log-probability."""
Line = dict[str, Any]
"""One record of the evaluation's file."""


def judge(asked: Asked, answers: Answers, slots: Slots, config: EvalConfig) -> tuple[list[Line], Score]:
    """Lines of the records asked, in order, and the task's score.

    A record found out to be unanswerable while it is judged (`Skip`) is counted with those that were not asked.
    """
    if isinstance(asked.task, LikelihoodTask):
        return _likelihoods(asked, slots)
    if isinstance(asked.task, AnswerTask):
        verdicts, said = _judge_answers(asked, answers, config)
    else:
        verdicts, said = _choose(asked, slots)
    reasons = collections.Counter(asked.reasons())
    lines = []
    for item, verdict, words in zip(asked.items, verdicts, said, strict=True):
        reasons.update([verdict.reason] if verdict.word == "skipped" else [])
        outcome = {"verdict": verdict.word, "credit": verdict.credit, "reason": verdict.reason}
        lines.append(_about(item) | words | {"target": item.target} | outcome)
    kept = [verdict for verdict in verdicts if verdict.word != "skipped"]
    return lines, judged(asked.task.name, kept, dict(reasons))


def _about(item: Item) -> Line:
    turns = item.record.messages
    return {"record": item.where, "prompt": turns[-2].content if turns else ""}


def _judge_answers(asked: Asked, answers: Answers, config: EvalConfig) -> tuple[list[Verdict], list[Line]]:
    assert isinstance(asked.task, AnswerTask)
    given = [answers[item.prompt] for item in asked.items]
    records = [item.record for item in asked.items]
    with (
        asked.task.session(config, records) as one,
        concurrent.futures.ThreadPoolExecutor(asked.task.threads) as threads,
    ):

        def verdict(record: Any, answer: str) -> Verdict:
            try:
                return one(record, answer)
            except Skip as skip:
                return Verdict("skipped", 0.0, str(skip))

        verdicts = list(threads.map(verdict, records, [without_thought(text) for text, _ in given]))
    return verdicts, [{"answer": text, "ended": ended} for text, ended in given]


def _total(question: Question, slots: Slots) -> float:
    """Sum of the log-probabilities of a question's tokens."""
    found = slots[question.tokens]
    return float(np.sum([found[slot] for slot in question.slots], dtype=np.float64))


def _choose(asked: Asked, slots: Slots) -> tuple[list[Verdict], list[Line]]:
    verdicts, said = [], []
    for item in asked.items:
        totals = [_total(question, slots) for question in item.questions]
        answer = item.options[int(np.argmax(totals))]
        verdicts.append(RIGHT if answer == item.target.strip() else wrong(f"{answer} is more probable"))
        said.append({"answer": answer, "log_probabilities": dict(zip(item.options, totals, strict=True))})
    return verdicts, said


def _likelihoods(asked: Asked, slots: Slots) -> tuple[list[Line], Score]:
    losses_N = np.array([-_total(item.questions[0], slots) for item in asked.items])
    tokens_N = np.array([len(item.questions[0].slots) for item in asked.items])
    lines = [
        _about(item) | {"target": item.target, "loss": loss, "tokens": count}
        for item, loss, count in zip(asked.items, losses_N.tolist(), tokens_N.tolist(), strict=True)
    ]
    return lines, perplexity(asked.task.name, losses_N, tokens_N, asked.reasons())
