# SPDX-License-Identifier: Apache-2.0
"""The modes of the command line that train and answer: each returns the JSON object that is its last line of output."""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from llm_jepa_jax.checkpoint.frozen import with_step
from llm_jepa_jax.checkpoint.hub import is_hub_id
from llm_jepa_jax.checkpoint.initial import Initial, initial_tokenizer, open_initial, with_initial
from llm_jepa_jax.checkpoint.peft import with_adapter
from llm_jepa_jax.checkpoint.places import Place, is_url, on_this_machine
from llm_jepa_jax.checkpoint.workdir import Workdir
from llm_jepa_jax.config import Config, InitConfig, freeze
from llm_jepa_jax.data.inspect import show_rows
from llm_jepa_jax.data.pipeline import TrainData, make_train_data
from llm_jepa_jax.data.sources import Source, Splits, absolute_paths, open_splits, shard_sources
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.encode import encode, view_ids
from llm_jepa_jax.eval.evaluate import Evaluator
from llm_jepa_jax.eval.generate import make_generator
from llm_jepa_jax.eval.scores import RESULT
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.processes import wait_for_all
from llm_jepa_jax.resolve import attention_backend, resolve
from llm_jepa_jax.run_directory import check_directory, claim, open_run
from llm_jepa_jax.text.chat import Message, render_prompt
from llm_jepa_jax.text.checkpoint_files import write_whole
from llm_jepa_jax.text.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer, saved_tokenizer
from llm_jepa_jax.train.loop import train as run_training
from llm_jepa_jax.train.phases import Phases
from llm_jepa_jax.train.progress import Bar
from llm_jepa_jax.train.saving import Evaluate
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.vocabulary import padding_line, with_vocabulary

LOG = logging.getLogger("llm_jepa_jax")


@dataclasses.dataclass(frozen=True)
class Job:
    """What every mode that reads data has: the resolved configuration, mesh, tokenizer and records."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    splits: Splits

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """Raises UserError where a task cannot be asked."""
        return Evaluator(self.config, self.mesh, self.tokenizer, self.splits.eval)

    def evaluate(self, directory: Place, phases: Phases, last_step: int) -> Evaluate | None:
        """What scores parameters, its verdicts going to `directory`; None where there is nothing to ask."""
        return _Evaluate(self.evaluator, directory, phases, last_step) if self.evaluator.tasks else None


def _prepare(values: ml_collections.ConfigDict, workdir: pathlib.Path) -> Job:
    config = freeze(values)
    if config.train.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(config.train.compile_cache).expanduser()))
    mesh = make_mesh(config.mesh)
    config = dataclasses.replace(config, init=_absolute(config.init))
    if config.lora.adapter:
        path = pathlib.Path(config.lora.adapter).expanduser().absolute()
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, adapter=str(path)))
    start = open_initial(config)
    config = with_initial(config, start)
    config = resolve(with_step(with_adapter(config, config.model), start), mesh.shape)
    config = dataclasses.replace(config, data=absolute_paths(config.data))
    if config.eval.databases:
        databases = str(pathlib.Path(config.eval.databases).expanduser().absolute())
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, databases=databases))
    splits = open_splits(config.data, config.seed)
    tokenizer = _tokenizer(config, workdir, splits.train, start)
    config = with_vocabulary(config, tokenizer.vocab_size, mesh.shape["tensor"], start.model.vocab_size if start else 0)
    return Job(config, mesh, tokenizer, splits)


def _absolute(init: InitConfig) -> InitConfig:
    name = init.checkpoint
    if not name or is_hub_id(name) or is_url(name):
        return init
    return dataclasses.replace(init, checkpoint=str(pathlib.Path(name).expanduser().absolute()))


def _tokenizer(config: Config, workdir: pathlib.Path, source: Source, start: Initial | None) -> Tokenizer:
    """The run's own tokenizer, else that of `init.checkpoint`, the one named, shards', or one trained on the split."""
    saved = saved_tokenizer(workdir)
    if saved is not None:
        return saved
    if start:
        return initial_tokenizer(config, start)
    if config.text.tokenizer:
        return load_tokenizer(config.text.tokenizer, config.text.chat_template)
    for shards in shard_sources(source):
        return shards.tokenizer()
    cache_dir = pathlib.Path(config.data.cache_dir).expanduser()

    def texts() -> Iterator[str]:
        return (content for i in range(len(source)) for content in source[i].contents())

    return cached_tokenizer(texts, source.content_hash, config.text.vocab_size, cache_dir)


def train(values: ml_collections.ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Trains, evaluates, and writes the report."""
    job = _prepare(values, workdir.files)
    config = job.config
    platform = job.mesh.devices.flat[0].platform
    parts = job.mesh.shape["context"]
    attention = attention_backend(config, platform, config.data.row_length, parts)  # before any work, should it refuse
    tasks = [task.name for task in job.evaluator.tasks]  # the same
    check_directory(workdir, config, job.splits)
    phases = Phases(workdir.files if jax.process_index() == 0 else None)
    LOG.info(
        "run %s on %d × %s, mesh %s, attention %s",
        workdir, job.mesh.size, job.mesh.devices.flat[0].device_kind, dict(job.mesh.shape), attention,
    )  # fmt: skip
    with phases.phase("prepare data"):
        data = make_train_data(config, job.tokenizer, job.splits.train, job.splits.weights)
    wait_for_all("claim")  # others may still be looking at what the directory holds
    claim(workdir, config, job.tokenizer, job.splits)
    if jax.process_index() == 0:
        for directory in (workdir.place, workdir.files):
            (directory / RESULT).unlink(missing_ok=True)  # there, it says that all is done
    _log_data(data)
    if padding := padding_line(config.model):
        LOG.info("%s", padding)
    factory = state_factory(config, job.mesh, data.num_steps)
    result = run_training(factory, data, workdir, phases, job.evaluate(workdir.files / "eval", phases, data.num_steps))
    if not result.stopped_early and config.log.report:
        with phases.phase("report"):
            pairs = _embed_pairs(job, result.state.whole)
            del result.state
            initial = _embed_pairs(job, factory.create().whole)
            if jax.process_index() == 0:
                from llm_jepa_jax.analysis.report import write_report  # a second of imports, wanted only at the end

                if len(pairs[0]):
                    np.savez(
                        workdir.files / "analysis.npz",
                        text_PxD=pairs[0], code_PxD=pairs[1], text_init_PxD=initial[0], code_init_PxD=initial[1],
                    )  # fmt: skip
                write_report(workdir.files)
        LOG.info("report: %s", workdir.place / "report.html")
    names = ("ntp_loss", "jepa_loss", "cos_pair", "cos_shuffled", *tasks, "tokens_per_s", "examples_per_s")
    metrics = {name: result.metrics[name] for name in names if name in result.metrics}
    report = {"report": str(workdir.place / "report.html")} if (workdir.files / "report.html").exists() else {}
    found = {"step": result.step} | metrics | {"workdir": str(workdir)} | report
    if not result.stopped_early:
        _write_result(workdir.files, found)
    workdir.finish(config.checkpoint.retry_seconds)
    return found


def _write_result(directory: pathlib.Path, result: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_whole(directory / RESULT, (json.dumps(result) + "\n").encode())


def _log_data(data: TrainData) -> None:
    s = data.summary()
    LOG.info(
        "data: %d examples with %d pairs in %d rows an epoch, fill %.1f%%, %.1f + %.1f tokens an example "
        "(conversation + views), %d steps",
        s["examples"], s["pairs"], s["rows_per_epoch"], 100 * s["fill"], s["conversation_tokens"], s["view_tokens"],
        s["num_steps"],
    )  # fmt: skip
    if s["windows_per_epoch"] > 1:
        LOG.info(
            "an epoch is planned in %d windows: numbers are the first one's, times as many", s["windows_per_epoch"]
        )
    for kind, k in zip(data.kinds, s["kinds"], strict=True):
        LOG.info(
            "steps of %s: %d examples in %d rows an epoch, fill %.1f%%, %d target and %d pair slots a row, "
            "segments up to %d tokens",
            kind, k["examples"], k["rows_per_epoch"], 100 * k["fill"], k["target_slots"], k["pair_slots"],
            k["longest_segment"],
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Evaluate:
    """Scores parameters at a step; the last step's evaluation is the full one."""

    evaluator: Evaluator
    directory: Place
    phases: Phases
    last_step: int

    def __call__(self, params: Any, step: int, tick: Callable[[], None] = lambda: None) -> dict[str, float]:
        config, evaluator = self.evaluator.config.eval, self.evaluator
        count = config.final_examples if step == self.last_step else config.num_examples
        size = evaluator.size(count)
        with self.phases.phase("evaluate"), Bar("evaluate", size, visible=jax.process_index() == 0) as bar:

            def progress(done: int) -> None:
                tick()
                bar.update(done)

            return evaluator(params, count, lambda task: self.directory / f"{task}-{step}.jsonl", progress)

    def quality(self, scores: dict[str, float]) -> float | None:
        return self.evaluator.quality(scores)


def _embed_pairs(job: Job, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of both views of held-out conversations, each [P, D]."""
    config, tokenizer, source = job.config, job.tokenizer, job.evaluator.conversations
    jepa, most = config.objective.jepa, config.log.report_pairs
    pairs = [pair for i in _evenly(len(source), most) for pair in source[i].pairs(config.data.pairs)]
    pairs = [pairs[i] for i in _evenly(len(pairs), most)]
    if not pairs:
        return np.zeros((0, config.model.embed_dim)), np.zeros((0, config.model.embed_dim))
    texts = view_ids(tokenizer, jepa, "text", [pair.text for pair in pairs])
    codes = view_ids(tokenizer, jepa, "code", [pair.code for pair in pairs])
    dtype = jnp.dtype(config.train.dtype)
    text_PxD, code_PxD = (encode(params, config.model, jepa, views, job.mesh, dtype) for views in (texts, codes))
    return text_PxD, code_PxD


def _evenly(total: int, most: int) -> list[int]:
    """At most so many numbers below the total, from the first to the last."""
    return np.linspace(0, total - 1, min(most, total)).round().astype(int).tolist()


def evaluate(values: ml_collections.ConfigDict, workdir: Place, out: str = "") -> dict[str, Any]:
    """Scores the newest checkpoint of a run on its evaluation split.

    Verdicts go to the run's `eval/`; with `out` to that directory, and the result into its `result.json`.
    """
    run = open_run(workdir, freeze(values))
    job = Job(run.config, run.mesh, run.tokenizer, open_splits(run.config.data, run.config.seed))
    directory = pathlib.Path(out) if out else workdir / "eval"
    score = job.evaluate(directory, Phases(None), run.step)
    scores = score(run.params, run.step) if score else {}
    result = {"step": run.step} | scores | {"workdir": str(workdir)}
    if out:
        directory.mkdir(parents=True, exist_ok=True)
        _write_result(directory, result)
    return result


def generate(values: ml_collections.ConfigDict, workdir: Place, prompts: Sequence[str]) -> dict[str, Any]:
    """Answers prompts with the newest checkpoint of a run; each answer is also printed as it is."""
    run = open_run(workdir, freeze(values))
    if not prompts:
        raise UserError("--mode=generate: no prompt; pass --prompt='…' or lines on stdin")
    generator = make_generator(run.config, run.tokenizer, run.mesh)
    system = [Message("system", run.system)] if run.system else []
    ids = [render_prompt(run.tokenizer, [*system, Message("user", prompt)]) for prompt in prompts]
    answers = [run.tokenizer.decode(new) for new, _ in generator(run.params, ids, seed=run.config.seed)]
    for prompt, answer in zip(prompts, answers, strict=True) if jax.process_index() == 0 else ():
        print(f"{prompt}\n  → {answer}")
    return {"step": run.step, "answers": answers, "workdir": str(workdir)}


def inspect(values: ml_collections.ConfigDict, workdir: Place, rows: int) -> dict[str, Any]:
    """Shows a few packed rows in colour."""
    job = _prepare(values, on_this_machine(workdir))
    data = make_train_data(job.config, job.tokenizer, job.splits.train, job.splits.weights)
    show_rows(data, job.tokenizer, rows, Console())
    return data.summary()
