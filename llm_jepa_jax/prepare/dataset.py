# SPDX-License-Identifier: Apache-2.0
"""What a data set is: its files, how their rows are read, and the record that a row becomes."""

import dataclasses
import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare import datasets
from llm_jepa_jax.prepare.source_files import SourceFile

SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}
"""Of a data set that comes without splits."""
Rows: TypeAlias = Iterator[tuple[str, Any]]
"""(`file:line`, what is there)."""
Line: TypeAlias = dict[str, Any]
"""A record as it is written (`data.records`)."""


class Drop(Exception):
    """A row that becomes no record; the message is the reason, under which such rows are counted."""


@dataclasses.dataclass(frozen=True)
class Original:
    """A file as it was published."""

    url: str
    sha256: str
    """As recorded by `dataset_infos.json` of Hugging Face's `datasets` 1.x."""
    default: bool = True
    """It is fetched where no source is named."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One arrangement of files in which a data set comes."""

    splits: Mapping[str, tuple[str, ...]]
    """The files, by their names, that the rows of each split are read from; split `all`: see `split_of`."""
    rows: Callable[..., Rows]
    """Rows of a split's files, each an argument."""
    record: Callable[[Any, str], Line]
    """The record of a row; `Drop` where there is none, UserError with `file:line` where the row is wrong."""
    split_of: Callable[[Any], str] | None = None
    """The split of a row of `all`; None: drawn from the record and the seed (`drawn_split`)."""
    rule: str = "as published"
    """How splits come about, in words."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What `--dataset=NAME` prepares. A file in `prepare/datasets/` that names its `DATASET` adds one."""

    name: str
    licence: str
    homepage: str
    layouts: tuple[Layout, ...]
    originals: tuple[Original, ...] = ()
    extra: tuple[str, ...] = ()
    """Names of further files, for `check`."""
    check: Callable[[Mapping[str, SourceFile]], Callable[[Any, str], None]] | None = None
    """Given all files by their names, a test of each row; for what lies in further files."""


def known() -> dict[str, DataSet]:
    """The data sets by name."""
    names = [module.name for module in pkgutil.iter_modules(datasets.__path__)]
    found = [importlib.import_module(f"{datasets.__name__}.{name}").DATASET for name in names]
    return {dataset.name: dataset for dataset in found}


def drawn_split(line: Line, seed: int) -> str:
    """The split of a record where none is published, from the seed and what the record asks.

    Records that ask the same fall into one split, and a record stays where it is when others come or go.
    """
    asked = line["messages"][-2]["content"] if "messages" in line else "\n".join(sorted(line["group"]))
    number = int.from_bytes(hashlib.sha256(f"{seed} {asked}".encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        number -= share
        if number < 0:
            return split
    return "test"  # rounding


DRAWN_RULE = "drawn by sha256 of the seed and what a record asks: " + ", ".join(
    f"{share:.0%} {split}" for split, share in SHARES.items()
)


def conversation(system: str, user: str, assistant: str, **views: str) -> Line:
    """A record of one exchange, and views other than its turns; `Drop` where one is blank."""
    for name, content in (("question", user), ("answer", assistant), *views.items()):
        if not content.strip():
            raise Drop(f"blank {name}")
    roles = (("system", system), ("user", user), ("assistant", assistant))
    return {"messages": [{"role": role, "content": content} for role, content in roles], **views}


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be text.

    Raises:
        UserError: it is missing or something else.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: an object with `{name}` belongs here, not {type(row).__name__}; is it another file?")
    if name not in row:
        raise UserError(f"{where}: no `{name}`, only {', '.join(sorted(map(str, row)))[:120]}; is it another file?")
    if not isinstance(row[name], str):
        raise UserError(f"{where}: `{name}` is {type(row[name]).__name__}; a string belongs there")
    return row[name]
