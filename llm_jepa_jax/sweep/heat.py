# SPDX-License-Identifier: Apache-2.0
"""Heat maps over two axes of the grid, (k, λ) first, as HTML tables."""

import html
import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.colors import to_hex

from llm_jepa_jax.sweep import tables
from llm_jepa_jax.sweep.comparison import CellResult, Row
from llm_jepa_jax.sweep.points import symbol
from llm_jepa_jax.sweep.results import higher_is_better
from llm_jepa_jax.sweep.spec import Spec

ACROSS, DOWN = "objective.jepa.weight", "objective.jepa.num_predictors"


def axes_of(spec: Spec) -> tuple[str, str] | None:
    """The keys across and down: λ and k where the grid has them, else its first two with several values."""
    keys = [key for key, values in spec.grid if len(values) > 1]
    if len(keys) < 2:
        return None
    if ACROSS in keys and DOWN in keys:
        return ACROSS, DOWN
    return keys[0], keys[1]


def heat_maps(spec: Spec, metric: str, rows: Sequence[Row]) -> str:
    """A map of dev means for each row, variant and setting of the other axes."""
    axes = axes_of(spec)
    if axes is None:
        return ""
    maps = []
    for row in rows:
        groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[CellResult]] = {}
        for result in row.cells:
            rest = tuple((key, value) for key, value in result.cell.setting if key not in axes)
            groups.setdefault((result.cell.variant, rest), []).append(result)
        best = {result.cell for result in row.best_cells}
        for (variant, rest), results in groups.items():
            others = ", ".join(f"{symbol(key)} {value}" for key, value in rest)
            title = " · ".join(filter(None, [row.name, variant, others])) or metric
            shown = {tuple(dict(r.cell.setting)[axis] for axis in axes): r for r in results}
            maps.append(_map(spec, metric, title, axes, shown, best))
    return f'<h2>{html.escape(metric)} on dev by setting</h2><div class="heats">{"".join(maps)}</div>'


def _map(
    spec: Spec, metric: str, title: str, axes: tuple[str, str], shown: dict[tuple[str, ...], CellResult], best: set
) -> str:
    grid, higher = dict(spec.grid), higher_is_better(metric)
    names = [symbol(axis) for axis in axes]
    means = [result.dev.mean for result in shown.values() if result.dev.n]
    head = "".join(f"<th>{html.escape(names[0])} {html.escape(value)}</th>" for value in grid[axes[0]])
    lines = []
    for down in grid[axes[1]]:
        cells = [_cell(shown.get((across, down)), means, higher, best) for across in grid[axes[0]]]
        lines.append(f"<tr><th>{html.escape(names[1])} {html.escape(down)}</th>{''.join(cells)}</tr>")
    table = f'<table class="heat"><tr><th></th>{head}</tr>{"".join(lines)}</table>'
    return f"<div><h3>{html.escape(title)}</h3>{table}</div>"


def _cell(result: CellResult | None, means: Sequence[float], higher: bool, best: set) -> str:
    if result is None:
        return "<td></td>"
    if not result.dev.n:
        words = "failed" if result.failed else "not run"
        title = html.escape("; ".join(outcome.error for outcome in result.failed))
        return f'<td title="{title}" class="{"failed" if result.failed else "dim"}">{words}</td>'
    low, high = min(means), max(means)
    share = (result.dev.mean - low) / (high - low) if high > low else 1.0
    background = colormaps["viridis"](0.15 + 0.85 * (share if higher else 1.0 - share))
    ink = "#fff" if sum(background[:3]) < 1.35 else "#26323f"
    mean = tables.number(result.dev.mean, math.nan, higher)
    spread = "" if math.isnan(result.dev.std) else f"± {tables.number(result.dev.std, math.nan, higher)}, "
    failed = f", {len(result.failed)} failed" if result.failed else ""
    mark = ' class="best"' if result.cell in best else ""
    style = f"background:{to_hex(background)};color:{ink}"
    return f'<td{mark} style="{style}">{mean}<small>{spread}n {result.dev.n}{failed}</small></td>'
