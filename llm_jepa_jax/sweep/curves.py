# SPDX-License-Identifier: Apache-2.0
"""Learning curves of a sweep: mean over seeds, and their spread, over steps and over compute."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from llm_jepa_jax.analysis.plots import BLUE, GREEN, GREY, INK, ORANGE
from llm_jepa_jax.sweep.comparison import CellResult, Row
from llm_jepa_jax.sweep.results import DONE, Outcome, higher_is_better, value
from llm_jepa_jax.sweep.tables import PREFIXES, flops_power

COLORS = (GREY, BLUE, ORANGE, GREEN, INK, "#8a5fb0", "#c04f7a", "#4aa3a2")
"""The baseline's first."""
Curve = list[tuple[int, float, float]]
"""(step, FLOPs so far, value)."""


def learning_curves(rows: Sequence[Row], metric: str) -> list[tuple[str, Figure, str]]:
    """Name, figure and caption of each row's curves: the baseline and each variant's best setting."""
    figures = []
    for row in rows:
        cells = [*([row.baseline] if row.baseline else []), *row.best_cells]
        for name in dict.fromkeys((metric, "ntp_loss")):
            for by_compute in (False, True):
                figure = _figure(row.name, cells, name, by_compute)
                if figure:
                    caption = "Mean over seeds; the band is ± one standard deviation."
                    figures.append((f"{row.name} {name}", figure, caption))
    return figures


def _figure(row: str, cells: Sequence[CellResult], metric: str, by_compute: bool) -> Figure | None:
    curves = [(cell, _mean(cell, metric, by_compute)) for cell in cells]
    shown = [(cell, curve) for cell, curve in curves if curve is not None and len(curve[0]) > 1]
    if not shown:
        return None
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    factor = 100.0 if higher_is_better(metric) else 1.0
    power = flops_power(max(curve[0][-1] for _, curve in shown)) if by_compute else 0
    for number, (cell, (x, mean, std)) in enumerate(shown):
        x = x / 1000.0**power
        color = COLORS[number % len(COLORS)]
        label = " ".join(filter(None, [cell.cell.variant, cell.cell.label])) or metric
        marker = "o" if len(x) < 12 else None
        axes.plot(x, factor * mean, color=color, label=label, marker=marker, markersize=4)
        axes.fill_between(x, factor * (mean - std), factor * (mean + std), color=color, alpha=0.15, linewidth=0)
    axes.set_title(" ".join(filter(None, [row, metric, "by compute" if by_compute else "by step"])))
    axes.set_xlabel(f"{PREFIXES[power]}FLOP" if by_compute else "step")
    axes.set_ylabel("%" if higher_is_better(metric) else metric)
    if metric.endswith("_loss") and all((mean > 0).all() for _, (_, mean, _) in shown):
        _logarithmic(axes)
    if len(shown) > 1 or shown[0][0].cell.variant:
        axes.legend()
    return figure


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with plain numbers: the first steps' losses would leave the rest a flat line."""
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_minor_formatter("{x:g}" if top < 100 * bottom else NullFormatter())


def _mean(cell: CellResult, metric: str, by_compute: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Places, mean and standard deviation at the steps that all finished seeds have a value for."""
    curves = [curve for outcome in cell.outcomes if outcome.state == DONE and (curve := _curve(outcome, metric))]
    if not curves:
        return None
    values = [{step: number for step, _, number in curve} for curve in curves]
    flops = {step: work for step, work, _ in curves[0]}
    steps = sorted(set(values[0]).intersection(*values[1:]))
    if not steps or (by_compute and not flops[steps[-1]]):
        return None
    values_SxN = np.array([[of_seed[step] for of_seed in values] for step in steps])
    spread = values_SxN.std(axis=1, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    places = [flops[step] for step in steps] if by_compute else steps
    return np.array(places, float), values_SxN.mean(axis=1), spread


def _curve(outcome: Outcome, metric: str) -> Curve:
    steps, work = zip(*outcome.flops, strict=True)
    found = {line["step"]: number for line in outcome.lines if (number := value(line, metric)) is not None}
    last = outcome.result.get("step")
    if last and outcome.total_flops and steps[-1] < last:
        steps, work = (*steps, last), (*work, outcome.total_flops)
    return [(step, float(np.interp(step, steps, work)), number) for step, number in sorted(found.items())]
