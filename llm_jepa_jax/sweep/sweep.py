# SPDX-License-Identifier: Apache-2.0
"""A sweep from its flags to its tables."""

import argparse
import json
import logging
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import log_handler
from llm_jepa_jax.sweep import comparison, results, tables
from llm_jepa_jax.sweep.command_line import parse, read_spec
from llm_jepa_jax.sweep.devices import parse_devices
from llm_jepa_jax.sweep.page import write_page
from llm_jepa_jax.sweep.points import Point, command, point, points
from llm_jepa_jax.sweep.runner import Runner
from llm_jepa_jax.sweep.spec import Spec
from llm_jepa_jax.sweep.submit import job_lines
from llm_jepa_jax.sweep.tuning import against_the_grid, check_tunable, tune_sweep
from llm_jepa_jax.text.checkpoint_files import write_whole

LOG = logging.getLogger("llm_jepa_jax")


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Does what the arguments say; returns the last line of output.

    Raises:
        UserError: wrong input.
    """
    options, keys = parse(argv)
    spec, directory = read_spec(options, keys), pathlib.Path(options.dir)
    every = points(spec, directory)
    metric = results.metric_of(spec.metric, every[0].configuration["eval.tasks"])
    if options.tune:
        check_tunable(spec)
    check_manifest(directory, every)
    if not options.dry_run:
        write_manifest(directory, spec, every)
    if options.dry_run or options.form:
        return show(options, chosen(options, [*every, *scaled_points(spec, directory, every, metric)]))
    if not options.table:
        every = execute(options, spec, directory, every, metric)
    else:
        every = [*every, *scaled_points(spec, directory, every, metric)]
    return write_tables(spec, directory, every, metric)


def chosen(options: argparse.Namespace, every: Sequence[Point]) -> list[Point]:
    """Those of `--only`, or all.

    Raises:
        UserError: there is no such point.
    """
    names = {each.name: each for each in every}
    for name in options.only:
        if name not in names:
            raise UserError(f"--only={name}: no such point; there are {', '.join(names)}")
    return [names[name] for name in options.only] if options.only else list(every)


def execute(
    options: argparse.Namespace, spec: Spec, directory: pathlib.Path, every: list[Point], metric: str
) -> list[Point]:
    """Runs the points, and then those that equal compute asks for; returns all."""
    devices = parse_devices(options.devices)
    jobs = options.jobs or max(1, len(devices.numbers))

    def runs(some: Sequence[Point]) -> bool:
        return Runner(some, jobs, devices, options.retries, metric).run()

    scaled = scaled_points(spec, directory, every, metric) if not options.tune else []
    if options.tune:
        every, ended = tune_sweep(spec, directory, metric, runs)
        scaled = scaled_points(spec, directory, every, metric) if ended else []
        if scaled:
            runs(scaled)
    elif options.only:
        runs(chosen(options, [*every, *scaled]))
    elif runs(every):
        scaled = scaled_points(spec, directory, every, metric)
        if scaled:
            runs(scaled)
    return [*every, *scaled]


def scaled_points(spec: Spec, directory: pathlib.Path, every: Sequence[Point], metric: str) -> list[Point]:
    """Those at equal compute: known once every point has ended."""
    if not spec.equal_compute:
        return []
    outcomes = [results.read(each) for each in every]
    if any(outcome.state not in (results.DONE, results.FAILED) for outcome in outcomes):
        return []
    cells = comparison.scaled_cells(comparison.make_rows(spec, outcomes, metric))
    return [point(spec, cell, seed, directory) for seed in spec.seeds for cell in cells]


def check_manifest(directory: pathlib.Path, every: Sequence[Point]) -> None:
    """Points that were begun must still be what they were.

    Raises:
        UserError: one is not, with the keys that differ.
    """
    path = directory / "manifest.json"
    known = json.loads(path.read_text())["points"] if path.exists() else {}
    for each in every:
        before = known.get(each.name)
        if before is None or not each.workdir.exists():
            continue
        if before["fingerprint"] != each.fingerprint:
            now, old = json.loads(json.dumps(each.identity)), before["identity"]
            changed = [key for key in sorted({*now, *old}) if now.get(key) != old.get(key)]
            words = ", ".join(f"{key} was {old.get(key)!r}, now {now.get(key)!r}" for key in changed[:3])
            raise UserError(f"{each.workdir}: was begun with another configuration ({words}); name another --dir")
        tested = each.workdir / "test"
        if before["test"] != [each.test, each.test_examples] and tested.exists():
            raise UserError(
                f"{tested}: is of other test records ({before['test'][0]}); move it away, or name another --dir"
            )


def write_manifest(directory: pathlib.Path, spec: Spec, every: Sequence[Point]) -> None:
    """The sweep and its points' configurations; points of an earlier sweep here stay known."""
    path = directory / "manifest.json"
    known = json.loads(path.read_text())["points"] if path.exists() else {}
    now = {
        each.name: {
            "fingerprint": each.fingerprint,
            "identity": each.identity,
            "test": [each.test, each.test_examples],
        }
        for each in every
    }
    others = [name for name in known if name not in now]
    if others:
        LOG.info(
            "%d points of an earlier sweep in %s are no longer part of it; they stay there", len(others), directory
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps({"sweep": spec.to_json(), "points": known | now}, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--dir={directory}: cannot write there: {error.strerror}; name another directory") from error


def show(options: argparse.Namespace, some: Sequence[Point]) -> dict[str, Any]:
    """Prints the commands of points that are not done."""
    left = [outcome for outcome in map(results.read, some) if outcome.state != results.DONE]
    for outcome in left:
        lines = job_lines(outcome, options.form, options.job_option) if options.form else local_lines(outcome)
        print("\n".join(lines))
    return {"points": len(some), "done": len(some) - len(left), "shown": len(left)}


def local_lines(outcome: results.Outcome) -> list[str]:
    """What the runner starts for a point, one process after the other."""
    each = outcome.point
    stages = [] if outcome.result else [each.arguments]
    stages += [each.test_arguments] if each.test else []
    return [shlex.join(command(arguments)) for arguments in stages]


def write_tables(spec: Spec, directory: pathlib.Path, every: Sequence[Point], metric: str) -> dict[str, Any]:
    """table.md, table.csv, sweep.json and sweep.html; prints the first."""
    outcomes = [results.read(each) for each in every]
    rows = comparison.make_rows(spec, outcomes, metric)
    remarks = [*tables.explanation(spec, metric), *against_the_grid(directory, rows, metric)]
    table = tables.markdown(spec, metric, rows, outcomes, remarks)
    for name, text in (
        ("table.md", table),
        ("table.csv", tables.comma_separated(rows)),
        ("sweep.json", tables.as_json(spec, metric, rows, outcomes)),
    ):
        write_whole(directory / name, text.encode("utf-8", "backslashreplace"))
    write_page(spec, directory, metric, rows, outcomes, remarks)
    print(table)
    states = [outcome.state for outcome in outcomes]
    counts = {"points": len(states), "done": states.count(results.DONE), "failed": states.count(results.FAILED)}
    return counts | {"left": len(states) - counts["done"] - counts["failed"], "report": str(directory / "sweep.html")}


def main() -> None:
    """Exit code 0: all points are done; 1: some failed or are left; 2: wrong input, or a machine that refuses."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[log_handler()])
    LOG.setLevel(logging.INFO)
    try:
        result = run(sys.argv[1:])
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result), flush=True)
    if result.get("failed") or result.get("left"):
        sys.exit(1)
