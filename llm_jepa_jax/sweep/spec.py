# SPDX-License-Identifier: Apache-2.0
"""What a sweep is: a preset, what is varied, seeds, and what is compared. Read from a file, changed by flags."""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llm_jepa_jax.errors import UserError

PAPER_SEEDS = (82, 23, 37, 84, 4)
"""Of the published comparisons (arXiv 2509.14252)."""

Settings = tuple[tuple[str, str], ...]
"""Configuration keys and their values as text, in order."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One sweep. Keys are configuration keys without `--config.`; values are text, as on the command line."""

    config: str = "configs/tiny.py"
    """Preset, or a run's config.json."""
    common: Settings = ()
    """What every point has."""
    rows: tuple[tuple[str, Settings], ...] = (("", ()),)
    """Rows of the table: data sets, data fractions, models. Comparisons stay within a row."""
    baseline: tuple[str, Settings] | None = None
    """What others are compared with. It takes no grid."""
    variants: tuple[tuple[str, Settings], ...] = (("", ()),)
    """Objectives that are compared; each takes every setting of the grid."""
    grid: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Keys and values whose every combination is a setting."""
    settings: tuple[Settings, ...] = ()
    """Settings that are listed, instead of a grid."""
    random: int = 0
    """Draw so many settings of the grid; 0: all."""
    seeds: tuple[int, ...] = PAPER_SEEDS
    metric: str = ""
    """What is compared: a task's name, or a loss; empty: the first of `eval.tasks`."""
    test: str = ""
    """Records for a second evaluation (`data.eval`), which chooses nothing; empty: none."""
    test_examples: int = 0
    """How many of them; 0: all."""
    equal_compute: bool = False
    """Train each row's best settings again, for as many FLOPs as the baseline took."""

    def all_settings(self) -> list[Settings]:
        """Every setting of the grid, those drawn from it, or those listed."""
        if self.settings:
            return list(self.settings)
        keys = [key for key, _ in self.grid]
        every = [
            tuple(zip(keys, values, strict=True)) for values in itertools.product(*(values for _, values in self.grid))
        ]
        if not self.random:
            return every
        order = sorted(every, key=_draw)
        return [setting for setting in every if setting in order[: self.random]]

    @property
    def varied(self) -> set[str]:
        """Keys that not all points share."""
        parts = [setting for _, setting in (*self.rows, *self.variants)] + list(self.settings)
        parts += [self.baseline[1]] if self.baseline else []
        return {key for part in parts for key, _ in part} | {key for key, _ in self.grid}

    def to_json(self) -> dict[str, Any]:
        """What `from_mapping` reads."""
        return {
            "config": self.config, "common": dict(self.common), "rows": {name: dict(part) for name, part in self.rows},
            "baseline": {self.baseline[0]: dict(self.baseline[1])} if self.baseline else {},
            "variants": {name: dict(part) for name, part in self.variants},
            "grid": {key: list(values) for key, values in self.grid},
            "settings": [dict(setting) for setting in self.settings], "random": self.random,
            "seeds": list(self.seeds), "metric": self.metric, "test": self.test,
            "test_examples": self.test_examples, "equal_compute": self.equal_compute,
        }  # fmt: skip


def _draw(setting: Settings) -> int:
    """A number that is drawn once and for all for a setting: the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(setting).encode()).digest()[:8], "big")


def load(path: str) -> Spec:
    """The sweep that a Python file (`get_sweep()`) or a JSON file says.

    Raises:
        UserError: there is no such file, or it does not say a sweep.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"--spec={path}: no such file; pass one such as configs/sweeps/nl_rx_small.py")
    if file.suffix == ".json":
        try:
            values = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); a sweep is a JSON object") from error
    else:
        module_spec = importlib.util.spec_from_file_location("sweep_spec", file)
        if module_spec is None or module_spec.loader is None:
            raise UserError(f"--spec={path}: a sweep is a .py or a .json file")
        module = importlib.util.module_from_spec(module_spec)
        try:
            module_spec.loader.exec_module(module)
            values = module.get_sweep()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--spec={path}: {type(error).__name__}: {error}; a sweep's file defines get_sweep()"
            ) from error
    return from_mapping(values, path)


def from_mapping(values: Any, origin: str) -> Spec:
    """A sweep from nested mappings; what is left out has its default.

    Raises:
        UserError: an unknown key or a value of the wrong form, with the origin and the key.
    """
    fields = {field.name for field in dataclasses.fields(Spec)}
    if not isinstance(values, Mapping):
        raise UserError(f"{origin}: a sweep is a mapping with some of {', '.join(sorted(fields))}")
    read: dict[str, Callable[[Any, str], Any]] = {
        "config": _text, "metric": _text, "test": _text, "common": _part, "rows": _named, "variants": _named,
        "baseline": _baseline, "grid": _grid, "settings": _list, "random": _count, "seeds": _seeds,
        "test_examples": _count, "equal_compute": _flag,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{origin}: unknown key {name!r}; a sweep has some of {', '.join(sorted(fields))}")
        found[name] = read[name](value, f"{origin}: {name}")
    return checked(Spec(**found), origin)


def checked(spec: Spec, origin: str) -> Spec:
    """The sweep itself.

    Raises:
        UserError: it contradicts itself.
    """
    names = [name for name, _ in spec.variants] + ([spec.baseline[0]] if spec.baseline else [])
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise UserError(f"{origin}: two of baseline and variants are called {doubles[0]!r}; rename one")
    if len(names) > 1 and "" in names:
        raise UserError(f"{origin}: several variants, and one without a name; name it")
    if spec.settings and spec.grid:
        raise UserError(f"{origin}: `grid` and `settings` exclude each other; list all settings, or none")
    size = math.prod(len(values) for _, values in spec.grid)
    if spec.random > size or (spec.random and not spec.grid):
        raise UserError(f"{origin}: random={spec.random} of {size} settings; give fewer, or a larger grid")
    if spec.equal_compute and not spec.baseline:
        raise UserError(f"{origin}: equal_compute needs a baseline whose FLOPs the others are given; name one")
    every = [
        ("common", spec.common),
        *spec.rows,
        *spec.variants,
        *((f"settings[{i}]", s) for i, s in enumerate(spec.settings)),
    ]
    every += [spec.baseline] if spec.baseline else []
    for name, part in [*every, ("grid", spec.grid)]:
        for key, _ in part:
            if key == "seed":
                raise UserError(f"{origin}: {name} sets `seed`; give seeds with `seeds` (--seeds=…)")
    lengths = {"train.num_steps", "train.num_epochs"} & {
        key for key, _ in (*spec.grid, *itertools.chain(*spec.settings))
    }
    if spec.equal_compute and lengths:
        raise UserError(
            f"{origin}: equal_compute sets train.num_steps, and so does the grid ({lengths.pop()}); use rows"
        )
    if spec.test_examples and not spec.test:
        raise UserError(f"{origin}: test_examples={spec.test_examples} without `test` (--test=FILE)")
    if spec.test and spec.metric.endswith("_loss"):
        raise UserError(f"{origin}: metric={spec.metric} is a loss of training, test records have tasks; name a task")
    return spec


def text_of(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
        return "(" + ",".join(map(str, value)) + ("," if len(value) == 1 else "") + ")"
    raise TypeError


def _part(value: Any, where: str) -> Settings:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {value!r} is no mapping of configuration keys, such as {{'train.num_steps': 100}}")
    try:
        return tuple((str(key), text_of(item)) for key, item in value.items())
    except TypeError as error:
        raise UserError(f"{where}: {dict(value)!r}: values are text, numbers, booleans or tuples of ints") from error


def _named(value: Any, where: str) -> tuple[tuple[str, Settings], ...]:
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{where}: {value!r}; names with their keys are wanted, such as {{'JEPA': {{…}}}}")
    return tuple((str(name), _part(part, f"{where}[{name!r}]")) for name, part in value.items())


def _baseline(value: Any, where: str) -> tuple[str, Settings] | None:
    if value == {}:
        return None
    found = _named(value, where)
    if len(found) > 1:
        raise UserError(f"{where}: {len(found)} baselines; one is wanted, the others are variants")
    return found[0]


def _grid(value: Any, where: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {value!r}; keys with lists of values are wanted")
    return tuple((str(key), _values(values, f"{where}[{key!r}]")) for key, values in value.items())


def _values(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"{where}: {values!r}; a list of values is wanted, such as [0.5, 1, 2]")
    texts = tuple(text_of(item) for item in values)
    if len(set(texts)) < len(texts):
        raise UserError(f"{where}: {', '.join(texts)}: a value comes twice")
    return texts


def _list(value: Any, where: str) -> tuple[Settings, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where}: {value!r}; a list of mappings is wanted")
    return tuple(_part(part, f"{where}[{number}]") for number, part in enumerate(value))


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise UserError(f"{where}: {value!r}; whole numbers from 0 are wanted, such as {list(PAPER_SEEDS)}")
    if len(set(value)) < len(value):
        raise UserError(f"{where}: {value!r}: a seed comes twice")
    return tuple(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {value!r}; text is wanted")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"{where}: {value!r}; a whole number from 0 is wanted")
    return value


def _flag(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise UserError(f"{where}: {value!r}; True or False is wanted")
    return value


def parse_values(text: str) -> list[str]:
    """The values of `a,b,c`; `0..4` are the whole numbers from 0 to 4. Commas in brackets and quotes separate none."""
    parts, depth, quote, part = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth and not quote:
            parts.append(part)
            part = ""
        else:
            part += letter
    return list(itertools.chain.from_iterable(_range(each) for each in [*parts, part]))


def _range(text: str) -> Iterable[str]:
    first, dots, last = text.partition("..")
    if dots and first.lstrip("-").isdigit() and last.lstrip("-").isdigit():
        return map(str, range(int(first), int(last) + 1))
    return [_unquoted(text)]


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
