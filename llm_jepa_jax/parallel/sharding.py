# SPDX-License-Identifier: Apache-2.0
"""Two tables from logical axis names to mesh axes: how parameters are stored, and how activations are computed."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jepa_jax.batch import FIELDS, Batch, RowShape, abstract_batch

LENGTH_AXIS = "context"

PARAMETER_RULES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": "tensor",
    "embed": (LENGTH_AXIS, "fsdp"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
    "norm": None,
    "bias": None,
    "predicted": None,
    "rank": None,
}
"""Storage: every matrix is cut over fsdp and context along its model width and over tensor along the other side."""

ACTIVATION_RULES: dict[str, str | tuple[str, ...] | None] = {
    "rows": ("slice", "data", "fsdp"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "length": LENGTH_AXIS,
    "whole_length": None,
    "replica_rows": ("slice", "data"),
    "stored_embed": (LENGTH_AXIS, "fsdp"),
    "looked_up": LENGTH_AXIS,
    "embed": None,
    "head_dim": None,
    "layers": None,
}
"""Computation: rows over the batch axes, their tokens over context; inside a block heads and mlp over tensor. What is
looked up lies first as the embedding does, for all rows of a replica."""

REPLICAS = ("slice", "data")
"""Axes whose devices hold the same part of every parameter: what the gradient is added up over as a whole."""


def parameter_spec(logical_axes: tuple[str, ...]) -> PartitionSpec:
    """The storage spec of a parameter.

    Raises:
        ValueError: two of its logical axes lie on one mesh axis.
        KeyError: a logical axis is not in `PARAMETER_RULES`.
    """
    mesh_axes = [PARAMETER_RULES[axis] for axis in logical_axes]
    used = [axis for axes in mesh_axes for axis in ((axes,) if isinstance(axes, str) else axes or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical_axes} share a mesh axis: {mesh_axes}")
    return PartitionSpec(*mesh_axes)


def is_axes(node: Any) -> bool:
    """Whether a node of a tree of logical axes is a leaf."""
    return isinstance(node, tuple) and all(isinstance(axis, str) for axis in node)


def parameter_shardings(mesh: Mesh, axes_tree: Any) -> Any:
    """Tree of logical axes to tree of `NamedSharding`."""
    return jax.tree.map(lambda axes: NamedSharding(mesh, parameter_spec(axes)), axes_tree, is_leaf=is_axes)


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct`s with the shardings of another tree of its structure."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )


def placed_batch(mesh: Mesh, num_rows: int, shape: RowShape) -> Batch:
    """The global batch of a step as the step takes it, without data."""
    shapes = abstract_batch(num_rows, shape)
    return placed(shapes, jax.tree.map(lambda _: rows_sharding(mesh), shapes))


def activation_axes(logical_axis: str) -> tuple[str, ...]:
    """The mesh axes of an activation's axis, without those that a `shard_map` around this code has divided already."""
    axes = ACTIVATION_RULES[logical_axis]
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis not in manual)


def activation_spec(*logical_axes: str | None) -> PartitionSpec:
    """The spec of an activation inside a jitted function; None: an axis that is not divided."""
    return PartitionSpec(*(axis and (activation_axes(axis) or None) for axis in logical_axes))


def length_parts(length: int) -> int:
    """Into how many parts the mesh in use cuts rows of so many tokens.

    Training's rows are checked to divide. Prompts and answers, which come in every length, lie whole where they do not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape[LENGTH_AXIS]
    return 1 if length % parts else parts


def constrain(array: jax.Array, *logical_axes: str) -> jax.Array:
    """Pins an activation's sharding inside a jitted function; nothing outside a mesh (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    axes = [
        None if axis == "length" and length_parts(size) == 1 else axis
        for axis, size in zip(logical_axes, array.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(array, activation_spec(*axes))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over the batch axes: batches, prompts, embeddings."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATION_RULES["rows"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def num_row_shards(mesh: Mesh) -> int:
    """How many parts the rows axis is cut into."""
    return math.prod(mesh.shape[axis] for axis in ACTIVATION_RULES["rows"] or ())


def row_parts(mesh: Mesh) -> tuple[int, ...]:
    """Of the equal parts that the rows axis is cut into, those that this process's devices hold."""
    parts = num_row_shards(mesh)
    spans = rows_sharding(mesh).addressable_devices_indices_map((parts,)).values()
    return tuple(sorted({span[0].start or 0 for span in spans if span}))


def global_batch(mesh: Mesh, local: dict[str, Any]) -> Batch:
    """This process's part of a batch (the rows of `row_parts`) to the global, sharded `Batch`."""
    sharding = rows_sharding(mesh)
    return Batch(**{name: jax.make_array_from_process_local_data(sharding, local[name]) for name in FIELDS})
