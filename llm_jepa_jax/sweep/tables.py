# SPDX-License-Identifier: Apache-2.0
"""The comparison as lines of a table, and these as Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from llm_jepa_jax.sweep.comparison import CLOSE, CellResult, Row, paired
from llm_jepa_jax.sweep.results import FAILED, Outcome, higher_is_better
from llm_jepa_jax.sweep.spec import Spec

PREFIXES = ("", "K", "M", "G", "T", "P", "E")
AS_CONFIGURED, EQUAL_COMPUTE = "as configured", "equal compute"


class Line(NamedTuple):
    """One cell, in numbers. NaN and None: there is no such number."""

    row: str
    variant: str
    setting: str
    budget: str
    """`as configured`, or `equal compute`: steps by the baseline's FLOPs."""
    best: bool
    """The variant's best setting in its row, chosen on dev."""
    baseline: bool
    seeds: int
    """That have a number."""
    wanted: int
    steps: float | None
    flops: float | None
    dev_mean: float
    dev_std: float
    test_mean: float
    test_std: float
    difference: float
    """To the baseline, on the test records where there are any, else on dev."""
    p: float
    pairs: int
    """Seeds that the difference and p are from."""
    failed: int


def make_lines(rows: Sequence[Row]) -> list[Line]:
    """Baseline first, then the cells as configured, then those at equal compute."""
    lines = []
    for row in rows:
        best = [result.cell for result in row.best_cells]
        if row.baseline:
            lines.append(_line(row, row.baseline, AS_CONFIGURED, False))
        lines += [_line(row, result, AS_CONFIGURED, result.cell in best) for result in row.cells]
        lines += [_line(row, result, EQUAL_COMPUTE, True) for result in (row.scaled or {}).values()]
    return lines


def _line(row: Row, result: CellResult, budget: str, best: bool) -> Line:
    is_baseline = result is row.baseline
    difference, p, pairs = math.nan, math.nan, 0
    if row.baseline and not is_baseline:
        ours, theirs = (result.test, row.baseline.test) if row.tested else (result.dev, row.baseline.dev)
        difference, p, pairs = (
            (found := paired(ours, theirs, higher_is_better(row.metric))).difference,
            found.p,
            found.n,
        )
    cell = result.cell
    return Line(
        cell.row, cell.variant, cell.label, budget, best, is_baseline, result.dev.n, len(result.outcomes),
        result.steps, result.flops, result.dev.mean, result.dev.std, result.test.mean, result.test.std, difference, p,
        pairs, len(result.failed),
    )  # fmt: skip


def warnings(rows: Sequence[Row]) -> list[str]:
    """What makes the comparison less than it seems."""
    found = []
    for row in rows:
        where, scaled = f"{row.name}: " if row.name else "", row.scaled or {}
        cells = [*([row.baseline] if row.baseline else []), *row.cells, *scaled.values()]
        lacking = {result.cell: result for result in cells if result.missing}
        for result in lacking.values():
            name = " ".join(filter(None, [result.cell.variant, result.cell.label])) or "the runs"
            seeds = f"seed{'s' * (len(result.missing) > 1)} {', '.join(map(str, result.missing))}"
            found.append(f"{where}{name} has no number for {seeds}: its mean is over fewer runs than others'")
        for cell, result in scaled.items():
            if result.cell == cell and row.baseline:
                close = f"takes the baseline's FLOPs to within {CLOSE:.0%}"
                found.append(f"{where}{cell.variant} {close}: equal compute is the same runs")
        lacking_compute = [best.cell for best in row.best_cells if row.scaled is not None and best.cell not in scaled]
        for cell in lacking_compute:
            found.append(f"{where}{cell.variant} has no run at equal compute yet, or its FLOPs are not recorded")
    return found


def number(mean: float, std: float, higher: bool) -> str:
    """Mean and standard deviation; shares in percent."""
    if math.isnan(mean):
        return "–"
    factor, digits = (100.0, 2) if higher else (1.0, 2 if abs(mean) >= 10 else 4)
    spread = "" if math.isnan(std) else f" ± {factor * std:.{digits}f}"
    return f"{factor * mean:.{digits}f}{spread}"


def signed(difference: float, higher: bool) -> str:
    if math.isnan(difference):
        return "–"
    return f"{100 * difference:+.2f}" if higher else f"{difference:+.{2 if abs(difference) >= 10 else 4}f}"


def probability(p: float) -> str:
    """As papers print it."""
    if math.isnan(p):
        return "–"
    return f"{p:.2e}" if p < 1e-3 else f"{p:.4f}"


def flops_text(flops: float | None) -> str:
    """In the largest unit that leaves digits before the point."""
    if not flops:
        return "–"
    power = flops_power(flops)
    return f"{flops / 1000**power:.3g} {PREFIXES[power]}FLOP"


def flops_power(flops: float) -> int:
    """The power of 1000 that leaves digits before the point; its name is in `PREFIXES`."""
    return max(0, min(len(PREFIXES) - 1, int(math.log10(flops) // 3)))


def columns(spec: Spec, metric: str) -> list[str]:
    unit = ", %" if higher_is_better(metric) else ""
    names = ["row"] if any(name for name, _ in spec.rows) else []
    names += ["variant"] if len(spec.variants) > 1 or spec.baseline else []
    names += ["setting"] if spec.grid or spec.settings else []
    names += ["budget"] if spec.equal_compute else []
    names += ["seeds", "steps", "training", f"{'train' if metric.endswith('_loss') else 'dev'} {metric}{unit}"]
    names += [f"test {metric}{unit}"] if spec.test else []
    return names + (["Δ", "p"] if spec.baseline else [])


def words(line: Line, names: Sequence[str], higher: bool) -> list[str]:
    """A line's cells under the columns of those names."""
    seeds = str(line.seeds) if line.seeds == line.wanted else f"{line.seeds} of {line.wanted}"
    seeds += f", {line.failed} failed" if line.failed else ""
    dev = number(line.dev_mean, line.dev_std, higher)
    found = {
        "row": line.row, "variant": line.variant, "setting": line.setting, "budget": line.budget, "seeds": seeds,
        "steps": "–" if line.steps is None else f"{line.steps:,.0f}", "training": flops_text(line.flops),
        "dev": dev, "train": dev, "test": number(line.test_mean, line.test_std, higher),
        "Δ": signed(line.difference, higher), "p": probability(line.p),
    }  # fmt: skip
    return [found[name.split(" ")[0]] for name in names]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def markdown(spec: Spec, metric: str, rows: Sequence[Row], outcomes: Sequence[Outcome], remarks: Sequence[str]) -> str:
    """The table, what is to be said of it, and every failure with its error."""
    names, higher = columns(spec, metric), higher_is_better(metric)
    out = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    marks = len([line for line in make_lines(rows) if line.best]) < len(make_lines(rows))
    for line in make_lines(rows):
        texts = [_escaped(text) for text in words(line, names, higher)]
        bold = line.best and line.budget == AS_CONFIGURED and marks and "setting" in names
        out.append("| " + " | ".join(f"**{text}**" if bold and text else text for text in texts) + " |")
    out += ["", *(f"- {_escaped(text)}" for text in [*remarks, *warnings(rows)])]
    failed = [outcome for outcome in outcomes if outcome.state == FAILED]
    if failed:
        out += ["", "## Failed", "", "| point | error |", "|---|---|"]
        out += [f"| {_escaped(outcome.point.name)} | {_escaped(outcome.error)} |" for outcome in failed]
    return "\n".join(out) + "\n"


def explanation(spec: Spec, metric: str) -> list[str]:
    """How to read the table."""
    better = "higher" if higher_is_better(metric) else "lower"
    found = [
        f"{metric}: {better} is better; mean ± sample standard deviation over seeds {', '.join(map(str, spec.seeds))}."
    ]
    found.append("training: FLOPs of the matrix products of all training steps.")
    if spec.baseline:
        on = "the test records" if spec.test else "dev"
        found.append(
            f"Δ, p: difference to {spec.baseline[0]} on {on}, and the one-tailed paired t-test between the same seeds; "
            "not corrected for the number of comparisons."
        )
    if spec.grid or spec.settings:
        found.append("bold: the best setting, chosen on dev alone.")
    if spec.equal_compute:
        found.append("equal compute: the best setting trained anew for as many steps as take the baseline's FLOPs.")
    if not spec.test:
        found.append("there are no test records: what is chosen on dev looks better there than it is.")
    return found


def comma_separated(rows: Sequence[Row]) -> str:
    """Every line with all its digits; an empty field: there is no such number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Line._fields)
    for line in make_lines(rows):
        writer.writerow(["" if item is None or item != item else item for item in line])
    return out.getvalue()


def as_json(spec: Spec, metric: str, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> str:
    """The sweep, its lines and its points."""
    lines = [
        {name: None if item != item else item for name, item in line._asdict().items()} for line in make_lines(rows)
    ]
    points: list[dict[str, Any]] = [
        {
            "name": outcome.point.name, "row": outcome.point.cell.row, "variant": outcome.point.cell.variant,
            "setting": dict(outcome.point.cell.setting), "seed": outcome.point.seed, "state": outcome.state,
            "error": outcome.error, "steps": outcome.result.get("step"), "flops": outcome.total_flops,
            "dev": outcome.result.get(metric), "test": outcome.test.get(metric),
        }
        for outcome in outcomes
    ]  # fmt: skip
    values = {"metric": metric, "sweep": spec.to_json(), "lines": lines, "points": points, "warnings": warnings(rows)}
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
