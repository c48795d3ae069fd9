# SPDX-License-Identifier: Apache-2.0
"""How parameters of ours lie in published files: one tensor a layer, matrices as [outputs, inputs], heads unfolded."""

import dataclasses
import math
from collections.abc import Iterator
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
    """0: it is not in the layers."""

    @property
    def names(self) -> list[str]:
        """Of all its tensors, in the order of layers."""
        return [self.name.format(layer) for layer in range(self.num_layers)] or [self.name]

    @property
    def num_inputs(self) -> int:
        """Of a matrix, how many of its axes of ours come first and are published columns; else 0."""
        return NUM_INPUTS.get(self.path.rpartition("/")[2], 0)

    @property
    def published_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        if self.num_inputs:
            return math.prod(self.shape[self.num_inputs :]), math.prod(self.shape[: self.num_inputs])
        return self.shape if self.path == "embedding" else (math.prod(self.shape),)

    def published_index(self, index: Index) -> Index:
        """The part of a tensor that holds this part of one layer."""
        if self.path == "embedding":
            return index
        parts = [(s.indices(size)[:2], size) for s, size in zip(index, self.shape, strict=True)]
        if self.num_inputs:
            return _folded(parts[self.num_inputs :]), _folded(parts[: self.num_inputs])
        return (_folded(parts),)

    def from_published(self, array: np.ndarray, index: Index) -> np.ndarray:
        """The part of one layer, from what `published_index` read."""
        shape = tuple(len(range(*s.indices(size))) for s, size in zip(index, self.shape, strict=True))
        return (array.T if self.num_inputs else array).reshape(shape)

    def to_published(self, array: np.ndarray) -> np.ndarray:
        """A whole layer as its tensor."""
        if self.num_inputs:
            return array.reshape(self.published_shape[::-1]).T
        return array.reshape(self.published_shape)


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
    """Every parameter of a model, in an order of names."""
    shapes = abstract_params(config, jnp.float32)[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = "/".join(entry.key for entry in path)
        in_layers = name.startswith(LAYERS)
        shape = leaf.shape[1:] if in_layers else leaf.shape
        yield Parameter(name, shape, family.tensor(name), config.num_layers if in_layers else 0)


def at(tree: Any, path: str) -> Any:
    """The leaf of a tree of parameters at `a/b`."""
    for name in path.split("/"):
        tree = tree[name]
    return tree
