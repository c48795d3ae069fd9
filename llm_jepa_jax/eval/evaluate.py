# SPDX-License-Identifier: Apache-2.0
"""Asks a model what its tasks want to know, judges what it says, and keeps every prompt, answer and verdict."""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llm_jepa_jax.config import Config
from llm_jepa_jax.data.sources import Source, with_conversation
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.generate import Generator, make_generator
from llm_jepa_jax.eval.judging import Answers, Slots, judge
from llm_jepa_jax.eval.likelihood import Question, log_probabilities
from llm_jepa_jax.eval.questions import Asked, Render, ask, cached_render, merged
from llm_jepa_jax.eval.scores import Score
from llm_jepa_jax.eval.task import AnyTask, LikelihoodTask, find_tasks
from llm_jepa_jax.text.checkpoint_files import write_whole
from llm_jepa_jax.text.tokenizer import Tokenizer

LOG = logging.getLogger("llm_jepa_jax")


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """The tasks of `eval.tasks` over evaluation records.

    Raises:
        UserError: a task is unknown, cannot be asked of any record, or misses what it needs (`Task.check`).
    """

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    source: Source
    tasks: tuple[AnyTask, ...] = dataclasses.field(init=False)
    """Those that the records can be asked: without a conversation, only likelihoods."""

    def __post_init__(self) -> None:
        """Fails before anything is trained, should it fail."""
        tasks = find_tasks(self.config.eval.tasks)
        silent = [task.name for task in tasks if not len(self._source(task))]
        if silent:
            LOG.warning("no evaluation record has a conversation: %s is skipped", ", ".join(silent))
        object.__setattr__(self, "tasks", tuple(task for task in tasks if task.name not in silent))
        for task in self.tasks:
            if task.check:
                task.check(self.config.eval, self._source(task))
        for asked in self.ask(self.config.eval.final_examples):
            if not asked.items:
                raise UserError(
                    f"config: `eval.tasks` names {asked.task.name}, which can ask none of {len(asked.skipped)} records "
                    f"({next(iter(asked.reasons()))}, {asked.skipped[0][0]}); leave it out or change `data.eval`"
                )
            self._check_lengths(asked)

    def _check_lengths(self, asked: Asked) -> None:
        longest = max(asked.items, key=lambda item: len(item.prompt))
        new, most = self.config.eval.max_new_tokens, self.config.model.max_positions
        if longest.prompt and len(longest.prompt) + new > most:
            raise UserError(
                f"{longest.where}: its prompt of {len(longest.prompt)} tokens and `eval.max_new_tokens`={new} exceed "
                f"`model.max_positions`={most}; lower it or leave the record out"
            )

    @functools.cached_property
    def conversations(self) -> Source:
        """The records that can be asked: plain text asks nothing."""
        every = self.source
        asked = with_conversation(every)
        if len(asked) < len(every):
            LOG.info(
                "evaluation: %d of %d records are plain text, which is left out", len(every) - len(asked), len(every)
            )
        return asked

    def _source(self, task: AnyTask) -> Source:
        return self.source if isinstance(task, LikelihoodTask) else self.conversations

    @functools.cached_property
    def _generator(self) -> Generator:
        return make_generator(self.config, self.tokenizer, self.mesh)

    @functools.cached_property
    def _cache(self) -> dict[int, list[Asked]]:
        return {}

    @functools.cached_property
    def _rendered(self) -> Render:
        return cached_render(self.tokenizer)

    def ask(self, num_examples: int) -> list[Asked]:
        """What each task asks about `num_examples` records, taken evenly from those it can ask (0: all)."""
        if num_examples not in self._cache:
            self._cache[num_examples] = [self._ask(task, num_examples) for task in self.tasks]
        return self._cache[num_examples]

    def _ask(self, task: AnyTask, num_examples: int) -> Asked:
        source = self._source(task)
        count = min(num_examples or len(source), len(source))
        indices = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
        return ask(task, source, indices, self.tokenizer, self._rendered, self.config.model)

    def size(self, num_examples: int) -> int:
        """How many prompts and sequences an evaluation has: the units of `progress`."""
        prompts, questions = _distinct(self.ask(num_examples))
        return len(prompts) + len(questions)

    def __call__(
        self,
        params: Any,
        num_examples: int,
        path: Callable[[str], pathlib.Path],
        progress: Callable[[int], None] = lambda done: None,
    ) -> dict[str, float]:
        """Every task's metrics (`Score.metrics`) and `eval_examples`.

        Tasks with the same prompts share what is generated. Process 0 judges, and writes to `path(task)` one JSON line
        a record (where it is from, prompt, answer, target, verdict, reason) and beside it, as `.json`, the score.
        """
        every = self.ask(num_examples)
        prompts, questions = _distinct(every)
        dtype = jnp.dtype(self.config.train.dtype)
        generated = self._generator(params, prompts, progress, self.config.seed) if prompts else []
        texts = [(self.tokenizer.decode(ids), ended) for ids, ended in generated]
        answers = dict(zip(prompts, texts, strict=True))
        found = log_probabilities(
            params, self.config.model, questions, self.mesh, dtype, self.config.eval.batch_size,
            lambda done: progress(len(prompts) + done),
        )  # fmt: skip
        slots = {
            question.tokens: dict(zip(question.slots, values.tolist(), strict=True))
            for question, values in zip(questions, found, strict=True)
        }
        scores = [self._score(asked, answers, slots, path(asked.task.name)) for asked in every]
        metrics = {name: value for score in scores for name, value in score.metrics().items()}
        if jax.process_count() > 1:
            values = multihost_utils.broadcast_one_to_all(np.array(list(metrics.values()), np.float32))
            metrics = dict(zip(metrics, np.asarray(values).tolist(), strict=True))
        return metrics | {"eval_examples": max((len(a.items) + len(a.skipped) for a in every), default=0)}

    def quality(self, metrics: Mapping[str, float]) -> float | None:
        """What checkpoints are compared by, higher is better: the first task's score; None where it is not there."""
        task = self.tasks[0]
        if task.name not in metrics:
            return None
        value = float(metrics[task.name])  # metrics.jsonl has an infinite one as text
        return -value if isinstance(task, LikelihoodTask) else value

    def _score(self, asked: Asked, answers: Answers, slots: Slots, path: pathlib.Path) -> Score:
        """Judged by process 0 alone, so that no process sees another verdict; elsewhere an empty score."""
        if jax.process_index():
            return Score(asked.task.name, 0, 0, 0, 0, {}, {}, share=not isinstance(asked.task, LikelihoodTask))
        lines, score = judge(asked, answers, slots, self.config.eval)
        lines += [{"record": where, "verdict": "skipped", "reason": reason} for where, reason in asked.skipped]
        _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        _write(path.with_suffix(".json"), json.dumps(score.summary(), ensure_ascii=False, indent=2) + "\n")
        LOG.info("%s: %s", path.stem, score)
        return score


def _distinct(every: Sequence[Asked]) -> tuple[list[tuple[int, ...]], list[Question]]:
    """The prompts and the sequences of all tasks, each once."""
    items = [item for asked in every for item in asked.items]
    prompts = list(dict.fromkeys(item.prompt for item in items if item.prompt))
    return prompts, merged([question for item in items for question in item.questions])


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode("utf-8", "backslashreplace"))  # half a surrogate pair is JSON that way
