# SPDX-License-Identifier: Apache-2.0
"""Generates answers to held-out prompts, scores them, and keeps every prompt, output and verdict."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llm_jepa_jax.data.sources import Source
from llm_jepa_jax.eval.generate import Generator
from llm_jepa_jax.eval.tasks import Task
from llm_jepa_jax.text.chat import render_prompt


def evaluate(
    task: Task,
    generator: Generator,
    params: Any,
    source: Source,
    num_examples: int,
    path: pathlib.Path,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """The share of right answers, as `{task: share, "eval_examples": n}`.

    `num_examples` records are taken evenly from `source` (0: all). Process 0 writes one JSON line a record to `path`:
    prompt, output, gold, correct, and whether the answer ended by itself.
    """
    count = min(num_examples or len(source), len(source))
    records = [source[int(i)] for i in np.linspace(0, len(source) - 1, count).round().astype(int)]
    tokenizer = generator.tokenizer
    prompts = [render_prompt(tokenizer, task.prompt(record)) for record in records]
    answers = generator(params, prompts, progress)
    lines, right = [], 0
    for record, (ids, ended) in zip(records, answers, strict=True):
        output, gold = tokenizer.decode(ids), task.gold(record)
        correct = task.correct(output, gold)
        right += correct
        prompt = task.prompt(record)[-1].content
        lines.append({"prompt": prompt, "output": output, "gold": gold, "correct": correct, "ended": ended})
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        part.replace(path)
    return {task.name: right / count, "eval_examples": count}
