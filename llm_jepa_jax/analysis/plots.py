# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run. Every function takes numbers and returns a matplotlib figure; `STYLE` is how they look."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from llm_jepa_jax.analysis.projections import tsne_places
from llm_jepa_jax.objectives.diagnostics import pair_cosines, shuffled_cosines

INK, BLUE, ORANGE, GREEN, GREY = "#26323f", "#2f6db5", "#d9822b", "#3c8d5a", "#9aa5b1"
STYLE: dict[Any, Any] = {
    "figure.figsize": (6.4, 3.7),
    "figure.dpi": 130,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
}
JOINED_PAIRS = 60
"""Pairs joined by a line in the t-SNE picture."""

Series = Sequence[tuple[float, float]]
"""(step, value) in order."""


def _figure(title: str) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _line(axes: matplotlib.axes.Axes, series: Series, label: str, color: str) -> None:
    steps, values = zip(*series, strict=True)
    axes.plot(steps, values, color=color, marker="o" if len(series) < 12 else None, markersize=4, label=label)


def curves(title: str, named: dict[str, Series], ylabel: str) -> Figure:
    """Values over steps, one line a name."""
    figure, axes = _figure(title)
    for (label, series), color in zip(named.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
        _line(axes, series, label, color)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    if len(named) > 1:
        axes.legend()
    return figure


def losses(ntp: Series, jepa: Series) -> Figure:
    """Both losses over steps, each with its own scale."""
    figure, axes = _figure("Losses")
    _line(axes, ntp, "next token (left)", BLUE)
    axes.set_xlabel("step")
    axes.set_ylabel("next token, nats", color=BLUE)
    handles = list(axes.lines)
    if jepa:
        right = axes.twinx()
        right.grid(False)
        right.spines["right"].set_visible(True)
        _line(right, jepa, "JEPA, 1 − cos (right)", ORANGE)
        right.set_ylabel("JEPA, 1 − cos", color=ORANGE)
        right.set_ylim(bottom=0)
        handles += list(right.lines)
    axes.set_ylim(bottom=0)
    axes.legend(handles=handles, loc="upper right")
    return figure


def task_scores(name: str, scores: Series, share: bool) -> Figure:
    """A task's score over steps; a share in percent."""
    factor, unit = (100.0, "%") if share else (1.0, "")
    figure, axes = _figure(f"{name} on held-out records")
    _line(axes, [(step, factor * value) for step, value in scores], name, GREEN)
    step, value = scores[-1]
    axes.annotate(
        f"{factor * value:.1f}{unit}", (step, factor * value), (-6, 8), textcoords="offset points", ha="right",
        color=INK,
    )  # fmt: skip
    axes.set_ylim(0, 105 if share else None)
    axes.set_xlabel("step")
    axes.set_ylabel(unit or name)
    return figure


def singular_values(spectra: dict[str, np.ndarray]) -> Figure:
    """Singular values of Enc(Text) − Enc(Code), largest first, on a log scale (LLM-JEPA, figure on the views' map)."""
    figure, axes = _figure("Singular values of Enc(Text) − Enc(Code)")
    for (label, values), color in zip(spectra.items(), (BLUE, GREY), strict=False):
        values = values[values > values[0] * 1e-6]
        axes.semilogy(np.arange(1, len(values) + 1), values, color=color, label=label)
    axes.set_xlabel("index")
    axes.legend()
    return figure


def tsne(text_PxD: np.ndarray, code_PxD: np.ndarray) -> Figure:
    """Both views in the plane; grey lines join some pairs."""
    figure, axes = _figure("t-SNE of both views")
    draw_plane(axes, *tsne_places(text_PxD, code_PxD), "Pred(Enc(Text))")
    axes.legend(markerscale=2)
    return figure


def draw_plane(axes: matplotlib.axes.Axes, text_Px2: np.ndarray, code_Px2: np.ndarray, text_label: str) -> None:
    """Places of both views, without scales; grey lines join some pairs."""
    for i in range(0, len(text_Px2), max(1, len(text_Px2) // JOINED_PAIRS)):
        axes.plot(*zip(text_Px2[i], code_Px2[i], strict=True), color=GREY, linewidth=0.5, alpha=0.6, zorder=1)
    axes.scatter(*text_Px2.T, s=10, color=BLUE, alpha=0.75, linewidths=0, label=text_label, zorder=2)
    axes.scatter(*code_Px2.T, s=10, color=ORANGE, alpha=0.75, linewidths=0, label="Enc(Code)", zorder=2)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def cosine_histogram(text_PxD: np.ndarray, code_PxD: np.ndarray) -> Figure:
    """How similar pairs are, against each text with another pair's code."""
    figure, axes = _figure("Cosine of held-out pairs")
    bins = np.linspace(-1, 1, 61)
    shuffled, pairs = shuffled_cosines(text_PxD, code_PxD), pair_cosines(text_PxD, code_PxD)
    axes.hist(shuffled, bins, color=GREY, alpha=0.7, label=f"shuffled, mean {shuffled.mean():.2f}")
    axes.hist(pairs, bins, color=BLUE, alpha=0.8, label=f"pairs, mean {pairs.mean():.2f}")
    axes.set_xlabel("cosine")
    axes.set_ylabel("pairs")
    axes.legend(loc="upper left")
    return figure


def phases(seconds: dict[str, float]) -> Figure:
    """Where the time went."""
    figure, axes = _figure("Time by phase")
    names = sorted(seconds, key=lambda name: seconds[name])
    bars = axes.barh(names, [seconds[name] for name in names], color=BLUE)
    axes.bar_label(bars, [f" {seconds[name]:.1f} s" for name in names], color=INK)
    axes.grid(False, axis="y")
    axes.set_xlabel("seconds")
    axes.margins(x=0.15)
    return figure


def departures(names: Sequence[str], named: dict[str, Sequence[float]], tolerance: float) -> Figure:
    """Relative differences of two models' hidden states by layer, on a log scale; what is equal lies at the bottom."""
    figure, axes = _figure("Relative difference of hidden states by layer")
    values = [value for series in named.values() for value in series if 0 < value < np.inf]
    floor, top = min([*values, tolerance]) / 10, max([*values, tolerance]) * 10
    for (label, series), color in zip(named.items(), (BLUE, ORANGE), strict=False):
        heights = np.clip(series, floor, top)
        axes.semilogy(np.arange(len(names)), heights, color=color, marker="o", markersize=3.5, label=label)
    axes.axhline(tolerance, color=GREY, linestyle="--", linewidth=1, label=f"tolerance {tolerance:g}")
    axes.set_ylim(floor / 2, top * 2)
    shown = range(0, len(names), max(1, -(-len(names) // 16)))
    axes.set_xticks(shown, [names[i] for i in shown], rotation=45, ha="right")
    axes.set_ylabel("relative RMS (equal: at the bottom)")
    axes.legend()
    return figure
