# SPDX-License-Identifier: Apache-2.0
"""Pictures of several models' views side by side: each takes measures by label (model and reading)."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llm_jepa_jax.analysis.geometry import SPECTRUM
from llm_jepa_jax.analysis.measures import KS, Measured
from llm_jepa_jax.analysis.plots import BLUE, GREEN, GREY, INK, ORANGE, draw_plane
from llm_jepa_jax.analysis.projections import Places

PALETTE = (GREY, BLUE, ORANGE, GREEN, "#8a5fb0", "#b5382f", "#3aa6b9", "#7a6a4f")
WORST_SHOWN = 2.0
"""Longest bar of a share of variance left; longer ones are cut, their number says so."""
Label = tuple[str, str]
"""Model and reading."""


def named(label: Label) -> str:
    """As legends and tables print it."""
    model, reading = label
    return model if reading == "Enc" else f"{model}, with [PRED]"


def _colours(labels: Sequence[Label]) -> dict[Label, str]:
    """One for each model, in every picture the same; beyond the palette they come again."""
    models = list(dict.fromkeys(model for model, _ in labels))
    return {label: PALETTE[models.index(label[0]) % len(PALETTE)] for label in labels}


def _panels(number: int, height: float) -> tuple[Figure, list[matplotlib.axes.Axes]]:
    """Up to three side by side, four as a square."""
    columns = 2 if number == 4 else min(number, 3)
    rows = -(-number // columns)
    figure = Figure(figsize=(max(3.6 * columns, 5.4), height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[number:]:
        axes.set_visible(False)
    return figure, list(grid[:number])


def spectra(measured: Mapping[Label, Measured]) -> Figure:
    """Singular values as they are, and over the length of the embeddings."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = _colours(list(measured))
    for label, found in measured.items():
        style = {"color": colours[label], "linestyle": "-" if label[1] == "Enc" else "--", "label": named(label)}
        for axes, values in ((left, found.spectrum), (right, found.relative_spectrum)):
            values = values[:SPECTRUM]
            values = np.where(values > max(values[0], 1e-30) * 1e-7, values, np.nan)  # what is left is rounding
            axes.semilogy(np.arange(1, len(values) + 1), values, **style)
    left.set_title("Singular values of Enc(Text) − Enc(Code)")
    right.set_title("… over √pairs · length of Enc(Code)")
    for axes in (left, right):
        axes.set_xlabel("index")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend()
    return figure


def linear_maps(measured: Mapping[Label, Measured]) -> Figure:
    """What the least-squares map leaves, on both halves, beside codes that do not belong to the texts."""
    figure = Figure(figsize=(7.2, 1.5 + 0.75 * len(measured)), layout="constrained")
    axes = figure.subplots()
    axes.set_title("Variance of Enc(Code) that no linear map of Enc(Text) explains")
    bars = {
        "pairs, fitted half": (BLUE, lambda m: m.pairs.train), "pairs, held out": (ORANGE, lambda m: m.pairs.held_out),
        "permuted pairs, held out": (GREY, lambda m: m.permuted.held_out),
        "Gaussian codes, held out": ("#cdd5dc", lambda m: m.gaussian.held_out),
    }  # fmt: skip
    places = np.arange(len(measured), dtype=float)
    for number, (name, (colour, of)) in enumerate(bars.items()):
        values = np.array([of(found.map) for found in measured.values()])
        heights = places + (number - 1.5) * 0.2
        drawn = axes.barh(heights, np.minimum(values, WORST_SHOWN), 0.18, color=colour, label=name)
        axes.bar_label(drawn, [f" {value:.2g}" for value in values], color=INK, fontsize=7)
    axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
    longest = max(max(bar.get_width() for bar in group) for group in axes.containers)
    axes.set_xlim(0, max(1.1, longest * 1.12))
    axes.set_yticks(places, [named(label) for label in measured])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("share left (dotted: the mean alone)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def cosine_histograms(measured: Mapping[Label, Measured]) -> Figure:
    """Pairs against each text with another pair's code."""
    figure, panels = _panels(len(measured), 2.9)
    for axes, (label, found) in zip(panels, measured.items(), strict=True):
        both = np.concatenate(found.cosines)
        bins = np.linspace(min(both.min(), 0.0), 1.0, 61)
        for values, colour, name in (
            (found.cosines.shuffled_P, GREY, "shuffled"), (found.cosines.pairs_P, BLUE, "pairs"),
        ):  # fmt: skip
            axes.hist(values, bins, color=colour, alpha=0.75, label=f"{name}, mean {values.mean():.2f}")
        axes.set_title(named(label))
        axes.set_xlabel("cosine")
        axes.set_ylabel("pairs")
        axes.margins(y=0.35)
        axes.legend(loc="upper left", fontsize=8)
    return figure


def recalls(measured: Mapping[Label, Measured]) -> Figure:
    """recall@k both ways, in percent."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title("Retrieval by cosine: recall, %")
    groups = [(way, k) for way in ("text_to_code", "code_to_text") for k in KS]
    colours, width = _colours(list(measured)), 0.8 / len(measured)
    for number, (label, found) in enumerate(measured.items()):
        values = [100 * getattr(found, way)[k] for way, k in groups]
        places = np.arange(len(groups)) + (number - (len(measured) - 1) / 2) * width
        hatch = "" if label[1] == "Enc" else "///"
        drawn = axes.bar(
            places, values, width * 0.92, color=colours[label], hatch=hatch, edgecolor="white", label=named(label)
        )
        axes.bar_label(drawn, [f"{value:.{value < 9.95:d}f}" for value in values], fontsize=7, color=INK)
    axes.set_xticks(np.arange(len(groups)), [f"{way.replace('_to_', ' → ')} @{k}" for way, k in groups])
    axes.margins(y=0.1)
    axes.grid(False, axis="x")
    figure.legend(loc="outside right upper")
    return figure


def alignment_uniformity(measured: Mapping[Label, Measured]) -> Figure:
    """Wang & Isola's plane: good embeddings lie lower left."""
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.set_title("Alignment and uniformity")
    colours = _colours(list(measured))
    for label, found in measured.items():
        uniform = (found.uniformity_text + found.uniformity_code) / 2
        marker = "o" if label[1] == "Enc" else "^"
        axes.scatter(uniform, found.alignment, s=55, color=colours[label], marker=marker, zorder=3, label=named(label))
    axes.set_xlabel("uniformity, mean of both views (lower: more spread)")
    axes.set_ylabel("alignment (lower: pairs closer)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)
    axes.legend()
    return figure


def planes(places: Mapping[Label, tuple[Places, str]]) -> Figure:
    """Both views in the plane for each label, with words below; one legend for all."""
    figure, panels = _panels(len(places), 3.4)
    for axes, (label, (found, words)) in zip(panels, places.items(), strict=True):
        draw_plane(axes, *found, "text view")
        axes.set_title(named(label))
        axes.set_xlabel(words)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, markerscale=2)
    return figure
