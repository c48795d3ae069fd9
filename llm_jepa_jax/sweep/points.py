# SPDX-License-Identifier: Apache-2.0
"""The points of a sweep: one run each, with its name, its directory, its command and its configuration."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from llm_jepa_jax.config import freeze, to_dict
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import REPOSITORY, parse
from llm_jepa_jax.schema import flatten
from llm_jepa_jax.sweep.spec import Settings, Spec

MACHINE = ("mesh", "checkpoint", "log", "data.workers", "data.prefetch", "data.cache_dir", "train.compile_cache")
"""Keys and sections that change nothing of what a point finds."""


SYMBOLS = {"objective.jepa.weight": "λ", "objective.jepa.num_predictors": "k", "objective.jepa.dropout": "LD"}


def symbol(key: str) -> str:
    """A key in tables: the papers' letter, or its own last part."""
    return SYMBOLS.get(key, key.rpartition(".")[2])


@dataclasses.dataclass(frozen=True)
class Cell:
    """What differs from other points by more than the seed."""

    row: str
    variant: str
    setting: Settings
    steps: int = 0
    """Steps of the point at equal compute; 0: as configured."""

    @property
    def label(self) -> str:
        """The setting in words."""
        return ", ".join(f"{symbol(key)} {value}" for key, value in self.setting)


@dataclasses.dataclass(frozen=True)
class Point:
    """One run."""

    cell: Cell
    seed: int
    config: str
    settings: Settings
    """All keys that differ from the preset; of two values for a key the later counts."""
    directory: pathlib.Path
    """Of the whole sweep."""
    test: str = ""
    """Records of the second evaluation."""
    test_examples: int = 0

    @property
    def name(self) -> str:
        """Readable, and a file name anywhere: what is no letter or digit gives way to a hash."""
        cell = self.cell
        parts = [part for part in (cell.row, cell.variant) if part]
        parts += [f"{key.rpartition('.')[2]}={value}" for key, value in cell.setting]
        parts += [f"steps={cell.steps}"] if cell.steps else []
        return _file_name("_".join([*parts, f"seed={self.seed}"]))

    @property
    def workdir(self) -> pathlib.Path:
        return self.directory / "points" / self.name

    @property
    def log(self) -> pathlib.Path:
        return self.directory / "logs" / f"{self.name}.log"

    @property
    def arguments(self) -> list[str]:
        """Of `llm_jepa_jax.main`, for training."""
        keys = dict(self.settings)
        return [
            f"--config={_preset(self.config)}", *(f"--config.{key}={value}" for key, value in keys.items()),
            f"--workdir={self.workdir}",
        ]  # fmt: skip

    @property
    def test_arguments(self) -> list[str]:
        """Of `llm_jepa_jax.main`, for the evaluation on the test records."""
        return [
            "--mode=eval", f"--config.data.eval={self.test}", f"--config.eval.final_examples={self.test_examples}",
            f"--workdir={self.workdir}", f"--out={self.workdir / 'test'}",
        ]  # fmt: skip

    @functools.cached_property
    def configuration(self) -> dict[str, Any]:
        """All keys with their values, flat.

        Raises:
            UserError: a key or a value is wrong.
        """
        try:
            return flatten(to_dict(freeze(parse(["main", *self.arguments]).config)))
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    @property
    def identity(self) -> dict[str, Any]:
        """The keys that make its training what it is."""
        return {
            key: value for key, value in self.configuration.items()
            if not any(key == part or key.startswith(part + ".") for part in MACHINE)
        }  # fmt: skip

    @property
    def fingerprint(self) -> str:
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def data_key(self) -> str:
        """The same for points whose tokenizer and tokenised data are the same."""
        wanted = {
            key: value for key, value in self.configuration.items() if key.startswith(("text.", "data.", "init."))
        }
        return json.dumps(wanted | ({} if wanted["data.eval"] else {"seed": self.seed}), sort_keys=True)


def command(arguments: list[str]) -> list[str]:
    """The real command line."""
    return [sys.executable, "-m", "llm_jepa_jax.main", *arguments]


def _preset(config: str) -> str:
    """A preset is found from anywhere."""
    path, colon, argument = config.partition(":")
    here = pathlib.Path(path)
    return config if here.is_file() or here.is_absolute() else f"{REPOSITORY / path}{colon}{argument}"


def _file_name(text: str) -> str:
    """The text itself where it is a plain file name, else what is left of it and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._=+-]+", "-", text)[:120].strip(".-")
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def cells(spec: Spec) -> Iterator[Cell]:
    """Row by row: the baseline, then each variant with each setting."""
    for row, _ in spec.rows:
        if spec.baseline:
            yield Cell(row, spec.baseline[0], ())
        for variant, _ in spec.variants:
            for setting in spec.all_settings() or [()]:
                yield Cell(row, variant, setting)


def point(spec: Spec, cell: Cell, seed: int, directory: pathlib.Path) -> Point:
    """A cell's run with one seed."""
    variants = dict(spec.variants) | dict([spec.baseline] if spec.baseline else [])
    settings = (*spec.common, *dict(spec.rows)[cell.row], *variants[cell.variant], *cell.setting)
    if cell.steps:
        settings = (*settings, ("train.num_epochs", "0"), ("train.num_steps", str(cell.steps)))
    return Point(cell, seed, spec.config, (*settings, ("seed", str(seed))), directory, spec.test, spec.test_examples)


def points(spec: Spec, directory: pathlib.Path) -> list[Point]:
    """Every point, seed by seed, so that whole comparisons come early.

    Raises:
        UserError: a configuration is wrong, or two points are the same run.
    """
    found = [point(spec, cell, seed, directory) for seed in spec.seeds for cell in cells(spec)]
    seen: dict[str, Point] = {}
    for each in found:
        other = seen.setdefault(each.fingerprint, each)
        if other is not each:
            raise UserError(f"{other.name} and {each.name} are the same run; take one out")
    return found
