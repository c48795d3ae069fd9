# SPDX-License-Identifier: Apache-2.0
"""Flags of `python -m llm_jepa_jax.sweep`, and the sweep that they and a file say."""

import argparse
import dataclasses
import json
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.sweep import spec as specs
from llm_jepa_jax.sweep.spec import Settings, Spec

USAGE = "python -m llm_jepa_jax.sweep --dir=DIR [--spec=FILE] [--grid 'KEY=V,V' …] [--config.a.b=value …] [options]"
FORMS = ("shell", "slurm", "gke")


class Parser(argparse.ArgumentParser):
    """Wrong flags are wrong input like any other."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"command line: {message}; usage: {USAGE}")


def make_parser() -> Parser:
    parser = Parser(prog="python -m llm_jepa_jax.sweep", usage=USAGE, allow_abbrev=False, epilog="See docs/sweeps.md.")
    add = parser.add_argument
    add("--dir", required=True, help="the sweep's directory: goes on there if it holds one")
    add("--spec", help="a sweep's file, such as configs/sweeps/nl_rx_small.py; a sweep in --dir is taken by itself")
    add("--config", help="preset of every point")
    add("--grid", action="append", default=[], metavar="KEY=VALUES", help="values: 0.5,1,2 or 0..4; repeatable")
    add("--setting", action="append", default=[], metavar="'KEY=V KEY=V'", help="a listed setting; repeatable")
    add("--random", type=int, metavar="N", help="draw N settings of the grid")
    add("--seeds", help="such as 82,23,37,84,4 (the default)")
    add("--baseline", metavar="'NAME: KEY=V KEY=V'", help="what others are compared with; takes no grid")
    add("--variant", action="append", default=[], metavar="'NAME: KEY=V'", help="an objective to compare; repeatable")
    add("--row", action="append", default=[], metavar="'NAME: KEY=V'", help="a row of the table; repeatable")
    add("--metric", help="a task's name, ntp_loss or jepa_loss (the first of eval.tasks)")
    add("--test", help="records of a second evaluation, which chooses nothing")
    add("--test-examples", type=int, metavar="N", help="how many of them (all)")
    add(
        "--equal-compute", action="store_true", default=None, help="train the best settings at the baseline's FLOPs too"
    )
    add("--tune", action="store_true", help="find a good setting with at most a third of the grid's runs")
    add("--jobs", type=int, help="points at a time (one a device, else 1)")
    add("--devices", default="", help="cuda, cuda:0,1 or tpu:0,1,2,3: each point sees one")
    add("--retries", type=int, default=3, help="starts after a preemption, a signal or exit code 75 (3)")
    add("--only", action="append", default=[], metavar="POINT", help="run this point alone; repeatable")
    add("--table", action="store_true", help="run nothing: write the tables of what is there")
    add("--dry-run", action="store_true", help="show the commands, run none")
    add("--print", choices=FORMS, dest="form", help="print commands that submit the points as jobs, run none")
    add("--job-option", action="append", default=[], metavar="OPTION", help="of sbatch or jobset.py; repeatable")
    add("--debug", action="store_true", help="show the stack trace of an error")
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """The flags, and the keys that `--config.KEY=VALUE` sets.

    Raises:
        UserError: a flag is unknown or has a wrong value.
    """
    options, rest = make_parser().parse_known_args(argv)
    if "://" in options.dir:
        raise UserError(f"--dir={options.dir}: a sweep's directory is local; name one here, or a mounted bucket")
    keys = []
    for argument in rest:
        found = re.fullmatch(r"--config\.([\w.]+)=(.*)", argument, re.DOTALL)
        if not found:
            raise UserError(f"command line: unexpected {argument!r}; usage: {USAGE}")
        keys.append((found.group(1), found.group(2)))
    for name, least in (("jobs", 1), ("retries", 0), ("random", 0), ("test_examples", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')}={getattr(options, name)}: {least} at least")
    modes = [name for name in ("tune", "table", "dry_run", "form") if getattr(options, name)]
    if len(modes) > 1:
        raise UserError(f"command line: {' and '.join('--' + m.replace('_', '-') for m in modes)} exclude each other")
    if options.tune and options.only:
        raise UserError("command line: --tune and --only exclude each other; --tune says itself what is run")
    if options.job_option and options.form not in ("slurm", "gke"):
        raise UserError("--job-option belongs to --print=slurm or --print=gke")
    return options, tuple(keys)


def read_spec(options: argparse.Namespace, keys: Settings) -> Spec:
    """The sweep of `--spec`, or of the directory, changed by the other flags.

    Raises:
        UserError: there is none, or it contradicts itself.
    """
    given = [name for name in _CHANGES if getattr(options, name) not in (None, [], "")]
    manifest = pathlib.Path(options.dir) / "manifest.json"
    if options.spec:
        spec = specs.load(options.spec)
    elif manifest.exists():
        spec = specs.from_mapping(json.loads(manifest.read_text())["sweep"], str(manifest))
    elif not given:
        raise UserError(f"--dir={options.dir}: holds no sweep; say one with --spec, or with --grid and --seeds")
    else:
        spec = Spec()
    spec = dataclasses.replace(spec, **{_CHANGES[name]: _read(name, getattr(options, name)) for name in given})
    if options.setting and not options.grid:
        spec = dataclasses.replace(spec, grid=(), random=0)
    elif options.grid and not options.setting:
        spec = dataclasses.replace(spec, settings=())
    for key, _ in keys:
        if key in spec.varied:
            raise UserError(f"--config.{key}: the sweep varies this key; change the sweep's rows, variants or grid")
    spec = dataclasses.replace(spec, common=tuple((dict(spec.common) | dict(keys)).items()))
    return specs.checked(spec, "command line" if given or keys else options.spec or str(manifest))


_CHANGES = {
    "config": "config", "grid": "grid", "setting": "settings", "random": "random", "seeds": "seeds",
    "baseline": "baseline", "variant": "variants", "row": "rows", "metric": "metric", "test": "test",
    "test_examples": "test_examples", "equal_compute": "equal_compute",
}  # fmt: skip
"""Flags and the fields of `Spec` that they change."""


def _read(name: str, value: Any) -> Any:
    """A flag's value as its field has it."""
    if name == "grid":
        return specs.from_mapping({"grid": dict(_grid(text) for text in value)}, "--grid").grid
    if name == "setting":
        return tuple(_keys(text, f"--setting={text}") for text in value)
    if name == "seeds":
        return _seeds(str(value))
    if name == "baseline":
        return _named(str(value), "--baseline")
    if name in ("variant", "row"):
        found = [_named(text, f"--{name}") for text in value]
        if len(dict(found)) < len(found):
            raise UserError(f"--{name}: a name comes twice")
        return tuple(found)
    return value


def _grid(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not equals or not key or not values:
        raise UserError(f"--grid {text!r}: KEY=VALUES is wanted, such as objective.jepa.weight=0.5,1,2")
    return key, specs.parse_values(values)


def _seeds(text: str) -> tuple[int, ...]:
    values = specs.parse_values(text)
    if not all(value.isdigit() for value in values):
        raise UserError(f"--seeds={text}: whole numbers from 0 are wanted, such as 82,23,37,84,4")
    return specs.from_mapping({"seeds": [int(value) for value in values]}, "--seeds").seeds


def _named(text: str, flag: str) -> tuple[str, Settings]:
    name, colon, keys = text.partition(":")
    if not colon or not name.strip():
        raise UserError(f"{flag} {text!r}: 'NAME: KEY=VALUE KEY=VALUE' is wanted")
    return name.strip(), _keys(keys, f"{flag} {text!r}")


def _keys(text: str, where: str) -> Settings:
    try:
        parts = [part.partition("=") for part in shlex.split(text)]
    except ValueError as error:
        raise UserError(f"{where}: {error}; quote values as for a shell") from error
    wrong = [key for key, equals, _ in parts if not equals or not key]
    if wrong:
        raise UserError(f"{where}: {wrong[0]!r} is no KEY=VALUE")
    return tuple((key, value) for key, _, value in parts)
