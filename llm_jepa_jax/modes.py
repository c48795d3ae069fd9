# SPDX-License-Identifier: Apache-2.0
"""The modes of the command line: each returns the JSON object that is its last line of output."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from llm_jepa_jax.checkpoint.frozen import with_step
from llm_jepa_jax.checkpoint.hf_export import ExportSettings
from llm_jepa_jax.checkpoint.hub import is_hub_id
from llm_jepa_jax.checkpoint.initial import Initial, initial_tokenizer, open_initial, with_initial
from llm_jepa_jax.checkpoint.peft import with_adapter
from llm_jepa_jax.config import Config, InitConfig, freeze
from llm_jepa_jax.data.inspect import show_rows
from llm_jepa_jax.data.pipeline import TrainData, make_train_data
from llm_jepa_jax.data.sources import Source, Splits, absolute_paths, open_splits, with_conversation
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.encode import encode, view_ids
from llm_jepa_jax.eval.evaluate import evaluate as run_task
from llm_jepa_jax.eval.generate import Generator
from llm_jepa_jax.eval.tasks import TASKS
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.resolve import attention_backend, resolve, with_vocabulary
from llm_jepa_jax.run_directory import check_directory, claim, export_adapter, export_run, open_run
from llm_jepa_jax.text.chat import Message, render_prompt
from llm_jepa_jax.text.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer, saved_tokenizer
from llm_jepa_jax.train.loop import Evaluate
from llm_jepa_jax.train.loop import train as run_training
from llm_jepa_jax.train.phases import Phases
from llm_jepa_jax.train.progress import Bar
from llm_jepa_jax.train.state import state_factory

LOG = logging.getLogger("llm_jepa_jax")


@dataclasses.dataclass(frozen=True)
class Job:
    """What every mode that reads data has: the resolved configuration, mesh, tokenizer and records."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    splits: Splits

    @functools.cached_property
    def asked(self) -> Source:
        """The evaluation records that can be asked: plain text asks nothing."""
        every = self.splits.eval
        asked = with_conversation(every)
        if len(asked) < len(every):
            LOG.info(
                "evaluation: %d of %d records are plain text, which is left out", len(every) - len(asked), len(every)
            )
        return asked


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
    config = resolve(with_step(with_adapter(config, config.model), start), mesh.devices.shape)
    config = dataclasses.replace(config, data=absolute_paths(config.data))
    splits = open_splits(config.data, config.seed)
    tokenizer = _tokenizer(config, workdir, splits.train, start)
    config = with_vocabulary(config, tokenizer.vocab_size, mesh.shape["tensor"], start.model.vocab_size if start else 0)
    return Job(config, mesh, tokenizer, splits)


def _absolute(init: InitConfig) -> InitConfig:
    name = init.checkpoint
    if not name or is_hub_id(name) or "://" in name:
        return init
    return dataclasses.replace(init, checkpoint=str(pathlib.Path(name).expanduser().absolute()))


def _tokenizer(config: Config, workdir: pathlib.Path, source: Source, start: Initial | None) -> Tokenizer:
    """The run's own tokenizer, else the one named, that of `init.checkpoint`, or one trained on the training split."""
    saved = saved_tokenizer(workdir)
    if saved is not None:
        return saved
    if start:
        return initial_tokenizer(config, start)
    if config.text.tokenizer:
        return load_tokenizer(config.text.tokenizer, config.text.chat_template)
    cache_dir = pathlib.Path(config.data.cache_dir).expanduser()

    def texts() -> Iterator[str]:
        return (content for i in range(len(source)) for content in source[i].contents())

    return cached_tokenizer(texts, source.content_hash, config.text.vocab_size, cache_dir)


def train(values: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains, evaluates, and writes the report."""
    job = _prepare(values, workdir)
    config = job.config
    platform = job.mesh.devices.flat[0].platform
    attention = attention_backend(config, platform, config.data.row_length)  # before any work, should it refuse
    check_directory(workdir, config, job.splits)
    phases = Phases(workdir if jax.process_index() == 0 else None)
    LOG.info(
        "run %s on %d × %s, mesh %s, attention %s",
        workdir, job.mesh.size, job.mesh.devices.flat[0].device_kind, dict(job.mesh.shape), attention,
    )  # fmt: skip
    with phases.phase("prepare data"):
        data = make_train_data(config, job.tokenizer, job.splits.train, job.splits.weights)
    claim(workdir, config, job.tokenizer, job.splits)
    _log_data(data)
    factory = state_factory(config, job.mesh, data.num_steps)
    evaluator = _evaluator(job, workdir, phases, data.num_steps)
    result = run_training(factory, data, workdir, phases, evaluator)
    if not result.stopped_early and config.log.report:
        with phases.phase("report"):
            pairs = _embed_pairs(job, result.state.whole)
            del result.state
            initial = _embed_pairs(job, factory.create().whole)
            if jax.process_index() == 0:
                from llm_jepa_jax.analysis.report import write_report  # a second of imports, wanted only at the end

                if len(pairs[0]):
                    np.savez(
                        workdir / "analysis.npz",
                        text_PxD=pairs[0], code_PxD=pairs[1], text_init_PxD=initial[0], code_init_PxD=initial[1],
                    )  # fmt: skip
                write_report(workdir)
        LOG.info("report: %s", workdir / "report.html")
    names = ("ntp_loss", "jepa_loss", "cos_pair", "cos_shuffled", "exact_match", "tokens_per_s", "examples_per_s")
    metrics = {name: result.metrics[name] for name in names if name in result.metrics}
    report = {"report": str(workdir / "report.html")} if (workdir / "report.html").exists() else {}
    return {"step": result.step} | metrics | {"workdir": str(workdir)} | report


def _log_data(data: TrainData) -> None:
    s = data.summary()
    LOG.info(
        "data: %d examples with %d pairs in %d rows an epoch, fill %.1f%%, %.1f + %.1f tokens an example "
        "(conversation + views), %d steps",
        s["examples"], s["pairs"], s["rows_per_epoch"], 100 * s["fill"], s["conversation_tokens"], s["view_tokens"],
        s["num_steps"],
    )  # fmt: skip
    for kind, k in zip(data.kinds, s["kinds"], strict=True):
        LOG.info(
            "steps of %s: %d examples in %d rows an epoch, fill %.1f%%, %d target and %d pair slots a row, "
            "segments up to %d tokens",
            kind, k["examples"], k["rows_per_epoch"], 100 * k["fill"], k["target_slots"], k["pair_slots"],
            k["longest_segment"],
        )  # fmt: skip


def _evaluator(job: Job, workdir: pathlib.Path, phases: Phases, last_step: int) -> Evaluate | None:
    """Scores parameters at a step; the last step's evaluation is the full one. None where there is nothing to ask."""
    config, asked = job.config, job.asked
    task = TASKS[config.eval.tasks]
    if not len(asked):
        LOG.warning("no evaluation record has a conversation: %s is skipped", task.name)
        return None
    generator = Generator(
        config.model, job.tokenizer, job.mesh, config.eval.max_new_tokens, config.eval.batch_size,
        jnp.dtype(config.train.dtype),
    )  # fmt: skip

    def score(params: Any, step: int) -> dict[str, float]:
        wanted = config.eval.final_examples if step == last_step else config.eval.num_examples
        count = min(wanted or len(asked), len(asked))
        path = workdir / "eval" / f"{task.name}-{step}.jsonl"
        with phases.phase("evaluate"), Bar("evaluate", count, visible=jax.process_index() == 0) as bar:
            scores = run_task(task, generator, params, asked, count, path, bar.update)
        LOG.info("step %d: %s %.1f%% of %d", step, task.name, 100 * scores[task.name], count)
        return scores

    return score


def _embed_pairs(job: Job, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of both views of held-out conversations, each [P, D]."""
    config, tokenizer, source = job.config, job.tokenizer, job.asked
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


def evaluate(values: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Scores the newest checkpoint of a run on its evaluation split."""
    run = open_run(workdir, freeze(values))
    job = Job(run.config, run.mesh, run.tokenizer, open_splits(run.config.data, run.config.seed))
    score = _evaluator(job, workdir, Phases(None), run.step)
    scores = score(run.params, run.step) if score else {}
    return {"step": run.step} | scores | {"workdir": str(workdir)}


def generate(values: ml_collections.ConfigDict, workdir: pathlib.Path, prompts: Sequence[str]) -> dict[str, Any]:
    """Answers prompts with the newest checkpoint of a run; each answer is also printed as it is."""
    run = open_run(workdir, freeze(values))
    if not prompts:
        raise UserError("--mode=generate: no prompt; pass --prompt='…' or lines on stdin")
    config = run.config
    generator = Generator(
        config.model, run.tokenizer, run.mesh, config.eval.max_new_tokens, config.eval.batch_size,
        jnp.dtype(config.train.dtype),
    )  # fmt: skip
    system = [Message("system", run.system)] if run.system else []
    ids = [render_prompt(run.tokenizer, [*system, Message("user", prompt)]) for prompt in prompts]
    answers = [run.tokenizer.decode(new) for new, _ in generator(run.params, ids)]
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt}\n  → {answer}")
    return {"step": run.step, "answers": answers, "workdir": str(workdir)}


def inspect(values: ml_collections.ConfigDict, workdir: pathlib.Path, rows: int) -> dict[str, Any]:
    """Shows a few packed rows in colour."""
    job = _prepare(values, workdir)
    data = make_train_data(job.config, job.tokenizer, job.splits.train, job.splits.weights)
    show_rows(data, job.tokenizer, rows, Console())
    return data.summary()


def export(values: ml_collections.ConfigDict, workdir: pathlib.Path, out: str, form: str) -> dict[str, Any]:
    """Writes the newest checkpoint of a run as a published model, or its adapters alone (`form`: `peft`)."""
    if not out:
        raise UserError("--mode=export: no directory to write; pass --out=DIR")
    run = open_run(workdir, freeze(values))
    directory = pathlib.Path(out).expanduser()
    files = export_adapter(run, directory) if form == "peft" else export_run(run, directory, ExportSettings())
    return {"step": run.step, "out": out, "weight_files": files, "workdir": str(workdir)}
