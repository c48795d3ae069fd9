# SPDX-License-Identifier: Apache-2.0
"""`--mode=analyze`: what several models make of the same pairs of views; one is held at a time."""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.analysis.answers import Comparison, Line, compare_answers, read_answers
from llm_jepa_jax.analysis.measures import KS, Embeddings, Pairs, measure
from llm_jepa_jax.config import DataConfig, EvalConfig
from llm_jepa_jax.data.sources import JsonlSource, Source, Subset, open_splits, with_conversation
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.encode import encode, view_ids
from llm_jepa_jax.eval.evaluate import Evaluator
from llm_jepa_jax.eval.task import LikelihoodTask, find_tasks
from llm_jepa_jax.named_models import Model, find_models
from llm_jepa_jax.objective_config import JepaConfig
from llm_jepa_jax.run_directory import Run

LOG = logging.getLogger("llm_jepa_jax")
FEWEST = 10
"""Pairs of which anything can be said."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the flags ask for."""

    models: Sequence[str]
    """`NAME=DIR` or `DIR`."""
    data: str
    """A JSONL file; empty: the evaluation records of the runs."""
    out: str
    examples: int
    """Most pairs."""
    task: str
    """Whose answers are compared; empty: the runs' first."""
    answers: bool
    """Answers are generated, not read from the runs."""
    umap: bool


@dataclasses.dataclass
class Found:
    """What one model gave."""

    embeddings: dict[str, Embeddings]
    """By reading."""
    fits_P: np.ndarray
    """bool [P]: both views are within `model.max_positions`."""
    facts: dict[str, Any]
    answers: list[Line] | str
    """Or, why there are none."""


def analyze(request: Request) -> dict[str, Any]:
    """Encodes the same pairs with every model, measures them, compares answers, and writes it all to `out`.

    Raises:
        UserError: a model or the records cannot be read, or there are too few pairs.
    """
    models = find_models(request.models)
    out = _checked_out(request)
    task = _task(request, models)
    source, notes = _source(request, models)
    indices, pairs = _pairs(source, request.examples)
    found = {}
    for model in models:
        run = model.open()
        found[model.name] = _look(model, run, pairs)
        if request.answers:
            found[model.name].answers = _generate(models, model, run, Subset(source, indices), task, out)
        else:
            found[model.name].answers = _saved(model, run, task)
        del run
    fits_P = np.logical_and.reduce([each.fits_P for each in found.values()])
    if not fits_P.all():
        notes.append(f"{(~fits_P).sum()} of {len(pairs)} pairs are longer than a model's max_positions and left out.")
    if len({each.facts["read"] for each in found.values()}) > 1:
        notes.append("Not all models are read at the same place, each as it was trained: column “read”.")
    pairs = pairs.only(fits_P)
    _check_enough(pairs, source)
    if jax.process_index():
        return {}
    comparisons = _comparisons(found, notes, request.answers)
    return _write(request, found, fits_P, pairs, comparisons, task, notes, out)


def _checked_out(request: Request) -> pathlib.Path:
    """The directory to write, which is there then."""
    if request.umap:
        from llm_jepa_jax.analysis.projections import check_umap  # a second of imports

        check_umap()
    if not request.out:
        raise UserError("--mode=analyze: nowhere to write; pass --out=DIR")
    out = pathlib.Path(request.out).expanduser()
    if (out / "config.json").exists():
        raise UserError(f"--out={request.out}: holds a run or a model; name a directory of its own")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={request.out}: cannot be made ({error.strerror}); name another directory") from error
    return out


def _task(request: Request, models: Sequence[Model]) -> str:
    """The task whose answers are compared: one that judges them."""
    if request.task:
        [task, *others] = find_tasks(request.task)
        if others or isinstance(task, LikelihoodTask):
            raise UserError(f"--task={request.task}: name one task whose answers are right or wrong; docs/tasks.md")
        return task.name
    config = next((model.config.eval for model in models if model.config), EvalConfig())
    judged = [task.name for task in find_tasks(config.tasks) if not isinstance(task, LikelihoodTask)]
    return judged[0] if judged else EvalConfig().tasks


def _source(request: Request, models: Sequence[Model]) -> tuple[Source, list[str]]:
    """The records, and what is to be said of them."""
    runs = [model for model in models if model.config]
    if request.data:
        source: Source = JsonlSource(request.data)
    elif runs and runs[0].config:
        source = open_splits(runs[0].config.data, runs[0].config.seed).eval
    else:
        raise UserError("--mode=analyze: published models have no records of their own; pass --data=FILE.jsonl")
    notes = []
    for model in runs:
        facts = model.facts
        if facts["train_hash"] == source.content_hash:
            notes.append(f"{model.name} was trained on these very records: its numbers are not those of new ones.")
        if not request.data and facts["eval_hash"] != source.content_hash:
            raise UserError(
                f"--models: {model.name} was evaluated on other records than {runs[0].name}, or they have changed; "
                "pass --data=FILE.jsonl that none was trained on"
            )
    return source, notes


def _pairs(source: Source, most: int) -> tuple[np.ndarray, Pairs]:
    """Up to so many records, taken evenly from those that have pairs, and their pairs (those of the last turns)."""
    which = DataConfig().pairs
    conversations = with_conversation(source)
    chosen = np.linspace(0, len(conversations) - 1, min(most, len(conversations))).round().astype(np.int64)
    indices = conversations.indices[chosen] if len(conversations) else chosen[:0]
    pairs = [(source.location(i), pair) for i in indices.tolist() for pair in source[i].pairs(which)]
    kept = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int).tolist()]
    found = Pairs(
        tuple(location for location, _ in kept), tuple(p.text for _, p in kept), tuple(p.code for _, p in kept)
    )
    _check_enough(found, source)
    return indices, found


def _check_enough(pairs: Pairs, source: Source) -> None:
    train, held_out = pairs.halves() if len(pairs) else ([], [])
    if len(pairs) < FEWEST or min(len(train), len(held_out)) < 2:
        raise UserError(
            f"--data: {len(pairs)} pairs of views, with {len(set(pairs.texts))} different texts, in {len(source)} "
            f"records; give at least {FEWEST} pairs of several texts (plain text has none)"
        )


def _look(model: Model, run: Run, pairs: Pairs) -> Found:
    """Both views of all pairs: as they are (`Enc`), and with predictor tokens if the model was trained with any."""
    jepa = model.jepa(run)
    readings: dict[str, int | None] = {"Enc": 0}
    if jepa.weight and jepa.num_predictors:
        readings["Pred"] = None
    assert run.tokenizer is not None
    contents = {"text": pairs.texts, "code": pairs.codes}
    ids = {
        (reading, view): view_ids(run.tokenizer, jepa, view, contents[view], count)
        for reading, count in readings.items()
        for view in contents
    }
    most = run.config.model.max_positions
    fits_P = np.logical_and.reduce([[len(view) <= most for view in views] for views in ids.values()])
    embeddings = {}
    for reading in readings:
        LOG.info("analyze: %s: encoding %d pairs (%s)", model.name, fits_P.sum(), reading)
        views = []
        for view in contents:
            fitting = [tokens for tokens, fits in zip(ids[reading, view], fits_P, strict=True) if fits]
            with jax.default_matmul_precision("highest"):
                embedded_NxD = encode(run.params, run.config.model, jepa, fitting, run.mesh, jnp.float32)
            if not np.isfinite(embedded_NxD).all():
                raise UserError(f"{model.name}: its embeddings are not finite; the run has diverged, or is damaged")
            views.append(np.zeros((len(pairs), run.config.model.embed_dim), np.float32))
            views[-1][fits_P] = embedded_NxD
        embeddings[reading] = Embeddings(*views)
    return Found(embeddings, fits_P, _facts(model, run, jepa), "")


def _facts(model: Model, run: Run, jepa: JepaConfig) -> dict[str, Any]:
    """What tables say of a model."""
    end = {"content": "last token of the content", "turn": "end-of-turn token"}[jepa.view_end]
    end += f", {jepa.view_end_offset} before it" if jepa.view_end_offset else ""
    place = f"mean up to the {end}" if jepa.pooling == "mean" else end
    layer = "last layer" if jepa.layer in (-1, run.config.model.num_layers) else f"layer {jepa.layer}"
    norm = "final norm" if jepa.final_norm else "no norm"
    trained = f"λ {jepa.weight:g}, k {jepa.num_predictors}, {jepa.direction}, {jepa.distance}" if jepa.weight else ""
    return {
        "what": "run" if model.config else "published model", "directory": str(model.directory),
        "step": run.step if model.config else None, "width": run.config.model.embed_dim,
        "layers": run.config.model.num_layers, "read": f"{place}, {layer}, {norm}",
        "trained": trained or "without JEPA",
    }  # fmt: skip


def _saved(model: Model, run: Run, task: str) -> list[Line] | str:
    """The answers that the run's evaluation has left at this step, or why there are none."""
    if model.config is None:
        return f"{model.name} is a published model, which holds no answers"
    path = model.directory / "eval" / f"{task}-{run.step}.jsonl"
    return read_answers(path) if path.exists() else f"{model.name} has no eval/{path.name}"


def _generate(
    models: Sequence[Model], model: Model, run: Run, source: Source, task: str, out: pathlib.Path
) -> list[Line]:
    """Asks the model the records of the pairs, under the first run's settings for all."""
    settings = next((other.config.eval for other in models if other.config), EvalConfig())
    settings = dataclasses.replace(settings, tasks=task, final_examples=0)
    LOG.info("analyze: %s: answering %d records (%s)", model.name, len(source), task)
    assert run.tokenizer is not None
    evaluator = Evaluator(dataclasses.replace(run.config, eval=settings), run.mesh, run.tokenizer, source)
    path = out / "answers" / f"{model.name}.jsonl"
    evaluator(run.params, 0, lambda task: path)
    return [] if jax.process_index() else read_answers(path)


def _comparisons(found: dict[str, Found], notes: list[str], generated: bool) -> list[Comparison]:
    """Each model's answers against those of the model named before it."""
    comparisons = []
    names = list(found)
    for first, second in zip(names, names[1:], strict=False):
        both = [found[name].answers for name in (first, second)]
        lacking = next((why for why in both if isinstance(why, str)), None)
        try:
            if lacking:
                raise UserError(f"{lacking}; pass --answers to ask all models now")
            comparisons.append(compare_answers(first, second, *both))
        except UserError as error:
            if generated:
                raise
            notes.append(f"Fixed and broken from {first} to {second} is left out: {error}.")
    return comparisons


def _write(
    request: Request, found: dict[str, Found], fits_P: np.ndarray, pairs: Pairs, comparisons: list[Comparison],
    task: str, notes: list[str], out: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    from llm_jepa_jax.analysis.view_report import Analysis, write_analysis  # a second of imports, wanted only here

    LOG.info("analyze: measuring and drawing")
    embeddings = {
        (name, reading): Embeddings(*(view[fits_P] for view in views))
        for name, each in found.items()
        for reading, views in each.embeddings.items()
    }
    split = pairs.halves()
    measured = {label: measure(views, pairs, split) for label, views in embeddings.items()}
    few = [name for (name, _), m in measured.items() if m.map.too_few]
    if few:
        notes.append(
            f"{len(split[0])} pairs are fitted for the linear map, fewer than twice the width of "
            f"{', '.join(dict.fromkeys(few))}: its error on them says nothing, only that on held-out pairs does. "
            "Give more records, or raise --examples."
        )
    for note in notes:
        LOG.warning("analyze: %s", note)
    facts = {name: each.facts for name, each in found.items()}
    write_analysis(Analysis(pairs, facts, embeddings, measured, comparisons, task, notes, request.umap), out)
    numbers = {
        f"{name}/{reading}": {
            "singular_value_max": float(m.spectrum[0]), "effective_rank_difference": m.rank_difference,
            "cos_pair": float(m.cosines.pairs_P.mean()), "cos_shuffled": float(m.cosines.shuffled_P.mean()),
            "linear_map_held_out": m.map.pairs.held_out, "recall@1": m.text_to_code[KS[0]],
        }
        for (name, reading), m in measured.items()
    }  # fmt: skip
    changes = [{k: v for k, v in found.summary().items() if not k.startswith("both")} for found in comparisons]
    written = {"report": str(out / "analysis.html"), "numbers": str(out / "analysis.json")}
    return {"pairs": len(pairs), "models": numbers, "changes": changes} | written
