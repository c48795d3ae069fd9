# SPDX-License-Identifier: Apache-2.0
"""`report.html` of a run: one file that shows what happened, and says how to read it."""

import html
import json
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from llm_jepa_jax.analysis import plots
from llm_jepa_jax.analysis.page import figure, page
from llm_jepa_jax.objectives.diagnostics import effective_rank, pair_cosines, shuffled_cosines

EXAMPLES_SHOWN = 12


def write_report(run_directory: pathlib.Path) -> None:
    """Writes `plots/*.png` and a self-contained `report.html` from what the run left in its directory.

    Reads metrics.jsonl, eval/*.jsonl, analysis.npz and phases.json; what is missing is said to be missing.
    """
    metrics = _lines(run_directory / "metrics.jsonl")
    config = json.loads((run_directory / "config.json").read_text())
    tasks = _tasks(run_directory / "eval")
    analysis = run_directory / "analysis.npz"
    embeddings = dict(np.load(analysis)) if analysis.exists() else {}
    seconds = _json(run_directory / "phases.json")
    with matplotlib.rc_context(plots.STYLE):
        figures = _curves(metrics, tasks) | _views(embeddings)
        if seconds:
            figures["phases"] = (plots.phases(seconds), "Wall-clock seconds, added over restarts.")
        images = _save(figures, run_directory / "plots")
    body = [
        f"<h1>{html.escape(run_directory.absolute().name)}</h1>",
        f'<p class="dim">{html.escape(_what(config))}</p>',
        _cards(metrics, embeddings, tasks),
        f'<div class="plots">{"".join(images)}</div>',
        _answers(run_directory / "eval", tasks),
        "<h2>Configuration</h2><details><summary>resolved keys</summary>"
        f"<pre>{html.escape(json.dumps(config, indent=2))}</pre></details>",
    ]
    (run_directory / "report.html").write_bytes(page("LLM-JEPA run", body))


def _save(figures: dict[str, tuple[Figure, str]], directory: pathlib.Path) -> list[str]:
    """Writes each figure; the HTML of each."""
    directory.mkdir(exist_ok=True)
    images = []
    for name, (drawn, caption) in figures.items():
        drawn.savefig(directory / f"{name}.png")
        images.append(figure(name, (directory / f"{name}.png").read_bytes(), caption))
    return images


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    # Not splitlines: an answer may hold other line separators than the file's.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] if path.exists() else []


def _json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _tasks(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The last score of each task (`eval/TASK-STEP.json`), with its `step`."""
    last: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.json"), key=lambda path: int(path.stem.rpartition("-")[2])):
        score = _json(path) | {"step": int(path.stem.rpartition("-")[2])}
        last[score["task"]] = score
    return list(last.values())


def _what(config: dict[str, Any]) -> str:
    model, jepa = config["model"], config["objective"]["jepa"]
    views = (
        f"λ {jepa['weight']:g}, k {jepa['num_predictors']}, loss dropout {jepa['dropout']:g}"
        if jepa["weight"]
        else "off"
    )
    return (
        f"{model['num_layers']} layers of {model['embed_dim']}, vocabulary {model['vocab_size']}; JEPA: {views}; "
        f"data: {config['data']['train']}; seed {config['seed']}"
    )


def series(metrics: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the finite values of one metric."""
    return [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]


def _curves(metrics: list[dict[str, Any]], tasks: list[dict[str, Any]]) -> dict[str, tuple[Figure, str]]:
    figures: dict[str, tuple[Figure, str]] = {}
    ntp, jepa = (series(metrics, name) for name in ("ntp_loss", "jepa_loss"))
    if ntp:
        figures["losses"] = (plots.losses(ntp, jepa), "Both should fall; JEPA falls without holding next-token back.")
    named = {"pairs": series(metrics, "cos_pair"), "shuffled pairs": series(metrics, "cos_shuffled")}
    if all(named.values()):
        caption = "The gap is what the views say about each other. Both near 1: the embeddings have collapsed."
        figures["cosine"] = (plots.curves("Cosine of the two views", named, "cosine"), caption)
    for task in tasks:
        scores = series(metrics, task["task"])
        if scores:
            drawn = plots.task_scores(task["task"], scores, task["share"])
            figures[task["task"]] = (drawn, f"Last: {_interval(task)}, of {task['asked']} records.")
    ranks = {"text view": series(metrics, "rank_text"), "code view": series(metrics, "rank_code")}
    if all(ranks.values()):
        caption = "exp of the entropy of the singular values of up to 256 pairs: near 1 means collapse."
        figures["rank"] = (plots.curves("Effective rank of the embeddings", ranks, "dimensions"), caption)
    speed = series(metrics, "tokens_per_s")
    if speed:
        figures["throughput"] = (
            plots.curves("Throughput", {"tokens": speed}, "tokens a second"),
            "Padding not counted.",
        )
    return figures


def _views(embeddings: dict[str, np.ndarray]) -> dict[str, tuple[Figure, str]]:
    if not embeddings or len(embeddings["text_PxD"]) < 5:
        return {}
    text, code = embeddings["text_PxD"], embeddings["code_PxD"]
    spectra = {"trained": np.linalg.svd(text - code, compute_uv=False)}
    if "text_init_PxD" in embeddings:
        difference = embeddings["text_init_PxD"] - embeddings["code_init_PxD"]
        spectra["before training"] = np.linalg.svd(difference, compute_uv=False)
    return {
        "singular_values": (plots.singular_values(spectra), "A steep fall: the two views differ in few directions."),
        "cosine_histogram": (plots.cosine_histogram(text, code), "Pairs should stand right of shuffled pairs."),
        "tsne": (plots.tsne(text, code), "Lines join the two views of one record; short lines mean they agree."),
    }


def _interval(task: dict[str, Any]) -> str:
    """A score's 95% confidence interval."""
    factor, unit = (100.0, "%") if task["share"] else (1.0, "")
    return f"95% between {factor * task['low']:.1f}{unit} and {factor * task['high']:.1f}{unit}"


def _cards(metrics: list[dict[str, Any]], embeddings: dict[str, np.ndarray], tasks: list[dict[str, Any]]) -> str:
    def last(name: str) -> float | None:
        values = series(metrics, name)
        return values[-1][1] if values else None

    speed = [value for _, value in series(metrics, "tokens_per_s")]
    percent, plain = (lambda v: f"{100 * v:.1f}%"), (lambda v: f"{v:.2f}")
    cards: dict[str, tuple[float | None, Callable[[float], str]]] = {
        task["task"].replace("_", " "): (task["value"], percent if task["share"] else plain) for task in tasks
    }
    cards |= {
        "next-token loss": (last("ntp_loss"), lambda v: f"{v:.3f}"),
        "JEPA loss": (last("jepa_loss"), lambda v: f"{v:.3f}"),
        "tokens a second": (float(np.median(speed)) if speed else None, lambda v: f"{v:,.0f}"),
        "steps": (metrics[-1]["step"] if metrics else None, lambda v: f"{v:,}"),
    }
    if embeddings:
        text, code = embeddings["text_PxD"], embeddings["code_PxD"]
        cards |= {
            "cos(pair), held out": (float(pair_cosines(text, code).mean()), lambda v: f"{v:.3f}"),
            "cos(shuffled)": (float(shuffled_cosines(text, code).mean()), lambda v: f"{v:.3f}"),
            "effective rank": (effective_rank(text), lambda v: f"{v:.0f}"),
        }
    shown = [
        f'<div class="card"><b>{form(value)}</b>{html.escape(name)}</div>'
        for name, (value, form) in cards.items()
        if value is not None
    ]
    return f'<div class="cards">{"".join(shown)}</div>'


def _answers(directory: pathlib.Path, tasks: list[dict[str, Any]]) -> str:
    """The last answers to each task."""
    if not tasks:
        return "<h2>Answers</h2><p>This run has no evaluation.</p>"
    return "".join(_task_answers(directory / f"{task['task']}-{task['step']}.jsonl", task) for task in tasks)


def _task_answers(path: pathlib.Path, task: dict[str, Any]) -> str:
    head = f"<h2>Answers: {html.escape(task['task'].replace('_', ' '))}</h2>"
    counts = [f"{count} {word}" for word, count in task["words"].items() if word not in ("right", "wrong")]
    counts += [f"{count} skipped ({html.escape(reason)})" for reason, count in task["skipped"].items()]
    also = f"; {', '.join(counts)}" if counts else ""
    where = f"<code>eval/{html.escape(path.name)}</code>"
    if not task["share"]:
        return f"{head}<p>{task['value']:.2f} over {task['asked']} records in {where}{also}.</p>"
    lines = [line for line in _lines(path) if line["verdict"] != "skipped"]
    right = [line for line in lines if line["verdict"] == "right"]
    others = [line for line in lines if line["verdict"] != "right"]
    rows = [_answer(line) for line in others[:EXAMPLES_SHOWN] + right[:EXAMPLES_SHOWN]]
    return (
        f"{head}<p>{len(right)} of {len(lines)} right in {where}{also}: up to {EXAMPLES_SHOWN} others, then right "
        "ones.</p><table><tr><th></th><th>prompt</th><th>answer</th><th>target</th><th>why</th></tr>"
        f"{''.join(rows)}</table>"
    )


def _answer(line: dict[str, Any]) -> str:
    right = line["verdict"] == "right"
    mark = '<span class="right">✓</span>' if right else '<span class="wrong">✗</span>'
    cut = "" if line.get("ended", True) else ' <span class="dim">(cut)</span>'
    cells = [mark, html.escape(line["prompt"]), f"<code>{html.escape(line['answer'])}</code>{cut}"]
    cells += ["", ""] if right else [f"<code>{html.escape(line['target'])}</code>", html.escape(line["reason"])]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
