# SPDX-License-Identifier: Apache-2.0
"""`sweep.html`: the comparison as one file that needs nothing beside it."""

import html
import io
import json
import math
import pathlib
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from llm_jepa_jax.analysis import plots
from llm_jepa_jax.analysis.page import figure, page
from llm_jepa_jax.sweep import tables
from llm_jepa_jax.sweep.comparison import Row
from llm_jepa_jax.sweep.curves import learning_curves
from llm_jepa_jax.sweep.heat import heat_maps
from llm_jepa_jax.sweep.results import DONE, FAILED, Outcome, higher_is_better
from llm_jepa_jax.sweep.spec import Spec
from llm_jepa_jax.text.checkpoint_files import write_whole

MORE_CSS = """
body{max-width:72rem} .plots{grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr))}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.best td{font-weight:600} tr.baseline td{background:#f5f7f9} tr.better td.p{color:#3c8d5a;font-weight:600}
.warning{border-left:4px solid #d9822b;padding:.3rem .8rem;background:#fdf6ec;margin:.4rem 0}
table.heat{width:auto;border-collapse:separate;border-spacing:3px}
table.heat td,table.heat th{border:0;text-align:center}
table.heat td{min-width:5.2rem;padding:.55rem .5rem;border-radius:5px} table.heat td.best{outline:3px solid #26323f}
table.heat small{display:block;opacity:.8} .heats{display:flex;flex-wrap:wrap;gap:2.5rem} .scroll{overflow-x:auto}
.failed{color:#b5382f} details{margin:.6rem 0}
"""
NUMBERS = ("seeds", "steps", "training", "dev", "train", "test", "Δ", "p")


def write_page(
    spec: Spec,
    directory: pathlib.Path,
    metric: str,
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    remarks: Sequence[str],
) -> None:
    """Writes sweep.html into the sweep's directory; links to its points' reports are relative."""
    done = sum(outcome.state == DONE for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.state == FAILED]
    name = html.escape(directory.absolute().name)
    left = len(outcomes) - done - len(failed)
    counts = f"{len(outcomes)} points: {done} done, {len(failed)} failed, {left} left"
    with matplotlib.rc_context(plots.STYLE):
        figures = "".join(map(_figure, learning_curves(rows, metric)))
    body = [
        f'<h1>{name}</h1><p class="dim">{html.escape(spec.config)}; {counts}</p>',
        *(f'<p class="warning">{html.escape(text)}</p>' for text in tables.warnings(rows)),
        _failures(failed), _table(spec, metric, rows),
        "<ul class='dim'>", *(f"<li>{html.escape(text)}</li>" for text in remarks), "</ul>",
        heat_maps(spec, metric, rows),
        f"<h2>Learning curves</h2><div class='plots'>{figures}</div>" if figures else "",
        _points(directory, metric, outcomes),
        "<h2>The sweep</h2><details><summary>what it is made of</summary>"
        f"<pre>{html.escape(json.dumps(spec.to_json(), indent=1, ensure_ascii=False))}</pre></details>",
    ]  # fmt: skip
    write_whole(directory / "sweep.html", page(directory.absolute().name, body, MORE_CSS))


def _table(spec: Spec, metric: str, rows: Sequence[Row]) -> str:
    names, higher = tables.columns(spec, metric), higher_is_better(metric)
    kinds = [name.split(" ")[0] for name in names]
    heads = "".join(f"<th{_class(kind)}>{html.escape(name)}</th>" for kind, name in zip(kinds, names, strict=True))
    lines = []
    for line in tables.make_lines(rows):
        improves = line.difference > 0 if higher else line.difference < 0
        classes = [
            name
            for name, true in (
                ("best", line.best and "setting" in names), ("baseline", line.baseline),
                ("better", improves and line.p < 0.05),
            )
            if true
        ]  # fmt: skip
        texts = zip(kinds, tables.words(line, names, higher), strict=True)
        cells = "".join(f"<td{_class(kind)}>{html.escape(text)}</td>" for kind, text in texts)
        lines.append(f'<tr class="{" ".join(classes)}">{cells}</tr>')
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def _class(kind: str) -> str:
    return f' class="number {kind if kind == "p" else ""}"' if kind in NUMBERS else ""


def _failures(failed: Sequence[Outcome]) -> str:
    if not failed:
        return ""
    rows = "".join(
        f"<tr><td>{_link(f'logs/{o.point.name}.log', o.point.name)}</td>"
        f'<td class="failed"><code>{html.escape(o.error)}</code></td></tr>'
        for o in failed
    )
    return f"<h2>Failed</h2><table><tr><th>log</th><th>error</th></tr>{rows}</table><h2>Comparison</h2>"


def _points(directory: pathlib.Path, metric: str, outcomes: Sequence[Outcome]) -> str:
    higher = higher_is_better(metric)
    rows = []
    for outcome in outcomes:
        name, where = outcome.point.name, outcome.point.workdir
        report = _link(f"points/{name}/report.html", "report") if (where / "report.html").exists() else ""
        log = _link(f"logs/{name}.log", "log") if outcome.point.log.exists() else ""
        numbers = [_number(found.get(metric), higher) for found in (outcome.result, outcome.test)]
        cells = f"<td>{html.escape(name)}</td><td>{outcome.state}</td>"
        cells += "".join(f'<td class="number">{text}</td>' for text in numbers)
        rows.append(f"<tr>{cells}<td>{report} {log}</td></tr>")
    head = "<tr><th>point</th><th>state</th><th class='number'>dev</th><th class='number'>test</th><th></th></tr>"
    return f"<h2>Points</h2><details><summary>all {len(rows)}</summary><table>{head}{''.join(rows)}</table></details>"


def _number(value: object, higher: bool) -> str:
    return "–" if value is None else tables.number(float(str(value)), math.nan, higher)


def _link(target: str, text: str) -> str:
    return f'<a href="{html.escape(target)}">{html.escape(text)}</a>'


def _figure(named: tuple[str, Figure, str]) -> str:
    name, drawn, caption = named
    out = io.BytesIO()
    drawn.savefig(out, format="png")
    return figure(name, out.getvalue(), caption)
