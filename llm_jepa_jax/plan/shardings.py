# SPDX-License-Identifier: Apache-2.0
"""The sharding report: where every array of a training state lies on a mesh, and which lie there too often."""

import dataclasses
import math
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from llm_jepa_jax.config import Config
from llm_jepa_jax.models.lora import abstract_frozen
from llm_jepa_jax.objectives.parameters import abstract_parameters
from llm_jepa_jax.parallel.sharding import ACTIVATION_RULES, PARAMETER_RULES, REPLICAS, is_axes
from llm_jepa_jax.plan.memory import leaf_bytes
from llm_jepa_jax.train.state import state_factory

LARGE = 1 << 24
"""Bytes on one device from which an array that could be cut is worth a line."""
KINDS = {"params": "parameter", "frozen": "frozen"}


@dataclasses.dataclass(frozen=True)
class Placed:
    """One array of the state."""

    name: str
    """Its path in the tree of parameters, such as `layers/query`; of the optimizer's scalars, their path there."""
    kind: str
    """`parameter`, `frozen`, what the optimizer calls what it keeps of a parameter (`mu`, `nu`, …), or `scalar`."""
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    """Logical axes; empty where it has not those of its parameter."""
    spec: tuple[str | None, ...]
    """Mesh axes of each dimension, joined by `+`."""
    bytes_per_device: int
    copies: int
    """Devices that hold each part."""

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        spec = ", ".join(axes or "-" for axes in self.spec) or "-"
        axes = ", ".join(self.axes) or "-"
        return (
            f"{self.kind} {self.name}: {self.dtype} {shape} ({axes}) over ({spec}): "
            f"{self.bytes_per_device} bytes, {self.copies} copies"
        )


def shardings(config: Config, mesh: Any) -> list[Placed]:
    """Every array of the state of a run, in the order of its tree. Nothing is allocated."""
    abstract = state_factory(config, mesh, 1).abstract
    axes = {"params": abstract_parameters(config)[1], "frozen": abstract_frozen(config)[1]}
    logical = {
        _names(path): names
        for tree in axes.values()
        for path, names in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_axes)[0]
    }
    shapes = {
        _names(path[1:]): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
        if _field(path) in KINDS
    }
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        of = next((_names(path[start:]) for start in range(1, len(path)) if _names(path[start:]) in shapes), "")
        whole = bool(of) and shapes[of] == leaf.shape
        found.append(
            Placed(
                of or jax.tree_util.keystr(path).lstrip("."),
                KINDS.get(_field(path)) or (_kept_as(path) if of else "scalar"),
                leaf.shape,
                leaf.dtype.name,
                logical.get(of, ()) if whole else (),
                _spec(leaf),
                int(leaf_bytes(leaf)),
                mesh.size * math.prod(leaf.sharding.shard_shape(leaf.shape)) // max(1, math.prod(leaf.shape)),
            )
        )
    return found


def _field(path: tuple[Any, ...]) -> str:
    return str(getattr(path[0], "name", path[0]))


def _names(path: tuple[Any, ...]) -> str:
    """The path inside a tree of dictionaries; empty for any other."""
    parts = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
    return "/".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else ""


def _kept_as(path: tuple[Any, ...]) -> str:
    """The last named field before the parameter's own path."""
    fields = [entry.name for entry in path[1:] if isinstance(entry, jax.tree_util.GetAttrKey)]
    return fields[-1] if fields else "optimizer"


def _spec(leaf: Any) -> tuple[str | None, ...]:
    spec = (*leaf.sharding.spec, *(None,) * (len(leaf.shape) - len(leaf.sharding.spec)))
    return tuple(_joined(axes) for axes in spec)


def _joined(axes: str | tuple[str, ...] | None) -> str | None:
    return "+".join(axes) if isinstance(axes, tuple) else axes


def warnings(found: list[Placed], mesh: Any) -> list[str]:
    """In words, the large arrays that lie whole on all devices, or on more of them than `REPLICAS` make copies."""
    needed = math.prod(mesh.shape.get(axis, 1) for axis in REPLICAS)
    groups: dict[tuple[str, int], list[str]] = {}
    for each in found:
        everywhere = each.copies == mesh.size > 1
        if each.bytes_per_device >= LARGE and (everywhere or each.copies > needed):
            how = "whole" if everywhere else "in the same parts"
            groups.setdefault((how, each.copies), []).append(f"{each.kind} {each.name}")
    return [
        f"{len(names)} large arrays lie {how} on {copies} devices each; a larger mesh.fsdp or mesh.tensor would cut "
        f"what it divides: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}"
        for (how, copies), names in groups.items()
    ]


def show(found: list[Placed], console: Console) -> None:
    """The two tables of rules, and the arrays."""
    rules = Table(title="Logical axes", title_justify="left")
    for column in ("axis", "stored over", "computed over"):
        rules.add_column(column)
    for axis in sorted({*PARAMETER_RULES, *ACTIVATION_RULES}):
        rules.add_row(axis, *(_joined(table.get(axis)) or "" for table in (PARAMETER_RULES, ACTIVATION_RULES)))
    console.print(rules)
    arrays = Table(title="Arrays of the state", title_justify="left")
    for column in ("kind", "name", "type and shape", "logical axes", "mesh axes", "MiB a device", "copies"):
        arrays.add_column(column, justify="right" if column in ("MiB a device", "copies") else "left")
    for each in found:
        arrays.add_row(
            each.kind, each.name, f"{each.dtype} {' x '.join(map(str, each.shape))}", ", ".join(each.axes),
            ", ".join(axes or "-" for axes in each.spec), f"{each.bytes_per_device / 2**20:.2f}", str(each.copies),
        )  # fmt: skip
    console.print(arrays)
