# SPDX-License-Identifier: Apache-2.0
"""`--tune`: the tuner over a sweep's own points, and what it found beside what the grid says."""

import json
import logging
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.sweep import comparison, results
from llm_jepa_jax.sweep.points import Cell, Point, cells, point
from llm_jepa_jax.sweep.spec import Settings, Spec
from llm_jepa_jax.sweep.tuner import Place, Tuned, tune
from llm_jepa_jax.text.checkpoint_files import write_whole

LOG = logging.getLogger("llm_jepa_jax")


class StoppedError(Exception):
    """The sweep was asked to stop; the same command goes on."""


def check_tunable(spec: Spec) -> None:
    """Raises UserError: there is no grid to tune over."""
    if not spec.grid or spec.random or spec.settings:
        raise UserError("--tune: takes a whole grid (--grid, without --random and --setting)")


def tune_sweep(
    spec: Spec, directory: pathlib.Path, metric: str, run: Callable[[Sequence[Point]], bool]
) -> tuple[list[Point], bool]:
    """Tunes each variant of each row and writes tune.json; the points that were tried, and whether all came to an end.

    It decides by nothing but scores, so when it is started again it goes the same way over what is done.
    """
    baseline = [cell for cell in cells(spec) if spec.baseline and cell.variant == spec.baseline[0]]
    tried = [point(spec, cell, seed, directory) for seed in spec.seeds for cell in baseline]
    if tried and not run(tried):
        return tried, False
    found = []
    for row, _ in spec.rows:
        for variant, _ in spec.variants:
            try:
                found.append((row, variant, _tune(spec, directory, metric, run, (row, variant), tried)))
            except StoppedError:
                return tried, False
    write_whole(directory / "tune.json", (json.dumps(_found(spec, found), indent=1) + "\n").encode())
    return tried, True


def _tune(
    spec: Spec, directory: pathlib.Path, metric: str, run: Callable[[Sequence[Point]], bool], name: tuple[str, str],
    tried: list[Point],
) -> Tuned:  # fmt: skip
    sign = 1.0 if results.higher_is_better(metric) else -1.0

    def score(wanted: Sequence[tuple[Place, int]]) -> list[float | None]:
        some = [point(spec, Cell(*name, _setting(spec, place)), spec.seeds[seed], directory) for place, seed in wanted]
        tried.extend(some)
        if not run(some):
            raise StoppedError
        values = [results.value(results.read(each).result, metric) for each in some]
        return [None if value is None or not math.isfinite(value) else sign * value for value in values]

    tuned = tune([len(values) for _, values in spec.grid], len(spec.seeds), score)
    words = ", ".join(f"{key}={value}" for key, value in _best(spec, tuned).items()) or "nothing, every run failed"
    where = " ".join(filter(None, name))
    LOG.info(
        "tuned%s: %s, with %d of the grid's %d runs", f" {where}" if where else "", words, tuned.runs, tuned.grid_runs
    )
    return tuned


def _setting(spec: Spec, place: Place) -> Settings:
    return tuple((key, values[index]) for (key, values), index in zip(spec.grid, place, strict=True))


def _best(spec: Spec, tuned: Tuned) -> dict[str, str]:
    """Empty where every run failed."""
    return {} if tuned.best is None else dict(_setting(spec, tuned.best))


def _found(spec: Spec, found: Sequence[tuple[str, str, Tuned]]) -> list[dict[str, Any]]:
    return [
        {
            "row": row, "variant": variant, "best": _best(spec, tuned), "runs": tuned.runs,
            "grid_runs": tuned.grid_runs,
            "rounds": [
                [dict(_setting(spec, place)) | {"seed": spec.seeds[seed]} for place, seed in each]
                for each in tuned.history
            ],
        }
        for row, variant, tuned in found
    ]  # fmt: skip


def against_the_grid(directory: pathlib.Path, rows: Sequence[comparison.Row], metric: str) -> list[str]:
    """What the tuner found, and what it missed where the grid is complete."""
    path = directory / "tune.json"
    lines = []
    for entry in json.loads(path.read_text()) if path.exists() else []:
        row = next((row for row in rows if row.name == entry["row"]), None)
        mine = [c for c in row.cells if c.cell.variant == entry["variant"]] if row else []
        chosen = next((c for c in mine if dict(c.cell.setting) == entry["best"]), None)
        best = row.best(entry["variant"]) if row else None
        if chosen is None or best is None:
            continue
        higher = results.higher_is_better(metric)
        runs = f"{entry['runs']} of the grid's {entry['grid_runs']} runs"
        line = f"tuned {entry['variant'] or 'setting'}: {chosen.cell.label}, by {runs}"
        if sum(len(c.outcomes) for c in mine) == entry["grid_runs"] and not any(c.missing for c in mine):
            line += f"; {_behind(chosen, best, higher)}"
        lines.append(line + ".")
    return lines


def _behind(chosen: comparison.CellResult, best: comparison.CellResult, higher: bool) -> str:
    """The tuner's setting beside the whole grid's best."""
    if chosen is best:
        return "it is the whole grid's best"
    factor, unit = (100.0, " points") if higher else (1.0, "")
    behind = abs(best.dev.mean - chosen.dev.mean) * factor
    return f"the whole grid's best is {best.cell.label}, {behind:.2f}{unit} better on dev"
