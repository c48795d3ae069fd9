# SPDX-License-Identifier: Apache-2.0
"""How parameters of ours lie in published files: a tensor a layer, or rows of one; matrices as [outputs, inputs]."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.models.families.family import Family
from llm_jepa_jax.models.transformer import abstract_params

NUM_INPUTS = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
"""Of a matrix of ours, how many of its axes come first and are a published matrix's columns."""
LAYERS = "layers/"
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of ours and its published tensors."""

    path: str
    """Such as `layers/query`."""
    shape: tuple[int, ...]
    """Without the axis of layers."""
    name: str
    """Of its tensors; `{}` stands for the layer's number."""
    num_layers: int
    """How many layers are stacked in it; 0: none are."""
    first_row: int = 0
    """Where it begins in its tensors."""
    num_rows: int = 0
    """Of its tensors, which may hold other parameters too."""

    @property
    def names(self) -> list[str]:
        """Of all its tensors, in the order of layers."""
        return [self.name.format(layer) for layer in range(self.num_layers)] or [self.name]

    @property
    def num_inputs(self) -> int:
        """Of a matrix, how many of its axes of ours come first and are published columns; else 0."""
        return NUM_INPUTS.get(self.path.rpartition("/")[2], 0)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of its part of each tensor."""
        if self.num_inputs:
            return math.prod(self.shape[self.num_inputs :]), math.prod(self.shape[: self.num_inputs])
        return self.shape if self.path == "embedding" else (math.prod(self.shape),)

    @property
    def published_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        return (self.num_rows, *self.own_shape[1:])

    def published_index(self, index: Index) -> Index:
        """The part of a tensor that holds this part of one layer."""
        if self.path == "embedding":
            return index
        parts = [(s.indices(size)[:2], size) for s, size in zip(index, self.shape, strict=True)]
        rows = _folded(parts[self.num_inputs :])
        rows = slice(rows.start + self.first_row, rows.stop + self.first_row)
        return (rows, _folded(parts[: self.num_inputs])) if self.num_inputs else (rows,)

    def published_axes(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """What rows and columns are cut over, from what each axis of one layer is cut over: only the first one is of
        those that are folded into one."""
        if self.num_inputs:
            return axes[self.num_inputs], axes[0]
        return axes if self.path == "embedding" else axes[:1]

    def from_published(self, array: Any, index: Index) -> Any:
        """The part of one layer, from what `published_index` read."""
        shape = tuple(len(range(*s.indices(size))) for s, size in zip(index, self.shape, strict=True))
        return (array.T if self.num_inputs else array).reshape(shape)

    def to_published(self, array: np.ndarray) -> np.ndarray:
        """A whole layer as its part of its tensor."""
        if self.num_inputs:
            return array.reshape(self.own_shape[::-1]).T
        return array.reshape(self.own_shape)


def _folded(parts: list[tuple[tuple[int, int], int]]) -> slice:
    """The part of several axes folded into one; all but the first are whole, as heads are cut and their width is not.

    Raises:
        ValueError: another axis is cut.
    """
    ((start, stop), _), rest = parts[0], parts[1:]
    if any(span != (0, size) for span, size in rest):
        raise ValueError(f"only the first axis can be cut, not {parts}")
    width = math.prod(size for _, size in rest)
    return slice(start * width, stop * width)


def parameters(family: Family, config: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of a model, in an order of names; those of one tensor follow each other as they lie in it.

    Padding of the vocabulary is not published.
    """
    config = dataclasses.replace(config, vocab_multiple=1)
    groups: dict[str, list[tuple[int, Parameter]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config, jnp.float32)[0]):
        keys = [entry.key for entry in path]
        kind = "/".join(key for key in keys if not key.isdigit())
        number = next((key for key in keys if key.isdigit()), "{}")
        stacked = kind.startswith(LAYERS) and config.uniform
        shape, name = leaf.shape[1:] if stacked else leaf.shape, family.tensor(kind).format(number)
        parameter = Parameter("/".join(keys), shape, name, config.num_layers if stacked else 0)
        groups.setdefault(name, []).append((family.place(kind), parameter))
    for members in groups.values():
        group = [parameter for _, parameter in sorted(members, key=lambda member: member[0])]
        num_rows, row = sum(parameter.own_shape[0] for parameter in group), 0
        for parameter in group:
            yield dataclasses.replace(parameter, first_row=row, num_rows=num_rows)
            row += parameter.own_shape[0]


def by_tensor(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Parameters in groups that share their tensors."""
    return [list(group) for _, group in itertools.groupby(parameters, key=lambda parameter: parameter.name)]


def at(tree: Any, path: str) -> Any:
    """The leaf of a tree of parameters at `a/b`."""
    for name in path.split("/"):
        tree = tree[name]
    return tree
