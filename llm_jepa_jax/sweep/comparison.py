# SPDX-License-Identifier: Apache-2.0
"""What outcomes say: means over seeds, the best setting of each row, and tests against the baseline.

Settings are chosen on the evaluation of training (`dev`), never on the test records.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from scipy import stats

from llm_jepa_jax.sweep.points import Cell, cells
from llm_jepa_jax.sweep.results import DONE, FAILED, Outcome, higher_is_better, value
from llm_jepa_jax.sweep.spec import Spec

CLOSE = 0.02
"""Runs whose FLOPs differ by less, as a share, count as equal in compute: they are not trained again.

Far less than the scatter of seeds; with packed rows JEPA's attention, whose views are short, takes 1.8% less."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One metric of one cell, by seed."""

    by_seed: Mapping[int, float]

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """NaN of nothing."""
        return float(np.mean(list(self.by_seed.values()))) if self.by_seed else math.nan

    @property
    def std(self) -> float:
        """Of the sample (n − 1); NaN of fewer than two."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if self.n > 1 else math.nan


@dataclasses.dataclass(frozen=True)
class Paired:
    """One sample against another on the seeds that both have."""

    difference: float
    p: float
    """One-tailed paired t-test: how probable so great an improvement is where there is none. NaN: not defined."""
    n: int


def paired(ours: Sample, theirs: Sample, higher: bool) -> Paired:
    """Whether `ours` is better; with `higher` that is larger."""
    seeds = [seed for seed in ours.by_seed if seed in theirs.by_seed]
    first, second = (np.array([sample.by_seed[seed] for seed in seeds]) for sample in (ours, theirs))
    difference = float((first - second).mean()) if seeds else math.nan
    if len(seeds) < 2 or np.ptp(first - second) == 0:  # no scatter, no t
        return Paired(difference, math.nan, len(seeds))
    test = stats.ttest_rel(first, second, alternative="greater" if higher else "less")
    return Paired(difference, float(test.pvalue), len(seeds))


@dataclasses.dataclass(frozen=True)
class CellResult:
    """One cell with its outcomes, in the order of the seeds."""

    cell: Cell
    outcomes: tuple[Outcome, ...]
    metric: str

    @functools.cached_property
    def dev(self) -> Sample:
        return self._sample(lambda outcome: value(outcome.result, self.metric))

    @functools.cached_property
    def test(self) -> Sample:
        return self._sample(lambda outcome: value(outcome.test, self.metric))

    def _sample(self, of: Callable[[Outcome], float | None]) -> Sample:
        found = {outcome.point.seed: of(outcome) for outcome in self.outcomes if outcome.state == DONE}
        return Sample({seed: number for seed, number in found.items() if number is not None and math.isfinite(number)})

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.state == FAILED)

    @property
    def missing(self) -> tuple[int, ...]:
        """Seeds without a number: not run to the end, failed, or not finite."""
        return tuple(o.point.seed for o in self.outcomes if o.point.seed not in self.dev.by_seed)

    @property
    def steps(self) -> float | None:
        """Mean over seeds, of those that are done."""
        found = [outcome.result["step"] for outcome in self.outcomes if outcome.state == DONE]
        return float(np.mean(found)) if found else None

    @property
    def flops(self) -> float | None:
        """FLOPs of training, mean over seeds; None where none is recorded."""
        found = [o.total_flops for o in self.outcomes if o.state == DONE]
        known = [flops for flops in found if flops]
        return float(np.mean(known)) if known else None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row's cells."""

    name: str
    baseline: CellResult | None
    cells: tuple[CellResult, ...]
    """Of the variants, as configured."""
    metric: str
    tested: bool
    """There are test records: differences are on them."""
    scaled: Mapping[Cell, CellResult] | None = None
    """By best cell: the same at the baseline's compute; itself where it took as much. None: not asked for."""

    def best(self, variant: str) -> CellResult | None:
        """The variant's best setting on dev. One that lacks seeds comes behind those that lack fewer."""
        cells = [cell for cell in self.cells if cell.cell.variant == variant and cell.dev.n]
        sign = 1.0 if higher_is_better(self.metric) else -1.0
        return max(cells, key=lambda cell: (cell.dev.n, sign * cell.dev.mean), default=None)

    @property
    def best_cells(self) -> list[CellResult]:
        """Of each variant that has numbers."""
        variants = dict.fromkeys(cell.cell.variant for cell in self.cells)
        return [best for best in map(self.best, variants) if best]


def make_rows(spec: Spec, outcomes: Iterable[Outcome], metric: str) -> list[Row]:
    """Outcomes by row and cell, in the order of the sweep."""
    by_cell: dict[Cell, list[Outcome]] = {}
    for outcome in outcomes:
        by_cell.setdefault(outcome.point.cell, []).append(outcome)
    order = {cell: number for number, cell in enumerate(cells(spec))}
    in_order = sorted(by_cell, key=lambda cell: order[dataclasses.replace(cell, steps=0)])
    found = {cell: CellResult(cell, tuple(by_cell[cell]), metric) for cell in in_order}
    baseline = spec.baseline[0] if spec.baseline else None
    rows = []
    for name, _ in spec.rows:
        mine = [result for cell, result in found.items() if cell.row == name]
        plain = [result for result in mine if not result.cell.steps]
        base = next((result for result in plain if result.cell.variant == baseline), None)
        row = Row(name, base, tuple(result for result in plain if result is not base), metric, bool(spec.test))
        rows.append(dataclasses.replace(row, scaled=_scaled(row, mine)) if spec.equal_compute else row)
    return rows


def _scaled(row: Row, every: list[CellResult]) -> dict[Cell, CellResult]:
    by_cell = {result.cell: result for result in every}
    cells = {best.cell: scaled_cell(row, best) for best in row.best_cells}
    return {cell: by_cell[scaled] for cell, scaled in cells.items() if scaled in by_cell}


def scaled_cell(row: Row, result: CellResult) -> Cell | None:
    """The cell trained for as many steps as take the FLOPs that the row's baseline took: itself where it did that.

    None where FLOPs are not known of both.
    """
    base = row.baseline.flops if row.baseline else None
    if not base or not result.flops or not result.steps:
        return None
    equal = abs(result.flops / base - 1.0) < CLOSE
    return dataclasses.replace(result.cell, steps=0 if equal else max(1, round(result.steps * base / result.flops)))


def scaled_cells(rows: Iterable[Row]) -> list[Cell]:
    """The cells at equal compute that are to be trained beside the others."""
    cells = [scaled_cell(row, best) for row in rows for best in row.best_cells]
    return [cell for cell in cells if cell and cell.steps]
