# SPDX-License-Identifier: Apache-2.0
"""The plan as one picture: memory by kind against what a device has, and where a step's time goes."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MOST_BARS = 10
LEAST_SHARE = 0.003
"""Share of a bar below which a kind of memory is not drawn."""
COLOURS = plt.get_cmap("tab10")


def draw(result: dict[str, Any], memories: list[tuple[str, dict[str, float]]], path: pathlib.Path) -> None:
    """Writes the picture: one bar of memory for each way that was compared, and the chosen step's time by part."""
    timed = "seconds" in result
    figure, axes = plt.subplots(1, 2 if timed else 1, figsize=(13 if timed else 8, 5.5), squeeze=False)
    _memory(axes[0][0], result, memories[:MOST_BARS])
    if timed:
        _time(axes[0][1], result)
    figure.suptitle(f"{result['topology']} (estimates, {result['how']})")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _memory(axis: Any, result: dict[str, Any], memories: list[tuple[str, dict[str, float]]]) -> None:
    seen = [(kind, max(sizes[kind] / sum(sizes.values()) for _, sizes in memories)) for kind in memories[0][1]]
    kinds = [kind for kind, share in seen if share > LEAST_SHARE]
    left = [0.0] * len(memories)
    names = [name for name, _ in memories]
    for number, kind in enumerate(kinds):
        sizes = [memory[kind] for _, memory in memories]
        axis.barh(names, sizes, left=left, label=kind, color=COLOURS(number))
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    if result["hbm_available_gib"]:
        axis.axvline(result["hbm_available_gib"], color="black", linestyle="--", label="available")
    axis.invert_yaxis()
    axis.set_xlabel("GiB of a device")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8, frameon=False)


def _time(axis: Any, result: dict[str, Any]) -> None:
    parts = dict(result["seconds"]["by_scope"]) or {
        "compute": result["seconds"]["compute"], "attention kernel": result["seconds"]["attention_kernels"],
    }  # fmt: skip
    parts["waiting for links"] = result["seconds"]["exchanges_waited_for"]
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    names, values = [name for name, _ in ordered], [1e3 * value for _, value in ordered]
    bars = axis.barh(names, values, color=COLOURS(0))
    axis.bar_label(bars, fmt="%.0f", padding=3)
    axis.invert_yaxis()
    axis.set_xlabel(f"milliseconds of a step ({1e3 * result['estimated_step_s']:.0f} in all)")
    axis.set_xlim(0, 1.15 * max(values))
