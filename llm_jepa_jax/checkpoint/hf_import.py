# SPDX-License-Identifier: Apache-2.0
"""Published weights straight into the final sharding, layer by layer.

Every tensor is cut by rows over all devices of the mesh, so that each process reads one run of bytes of it and no byte
is read twice, however the parameter is sharded in the end: what devices lack of their part comes from each other, over
links that are faster than any disk. A cut by columns would touch every page of a file, and ask a store for every row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jepa_jax.checkpoint.hf_directory import HfCheckpoint
from llm_jepa_jax.checkpoint.hf_layout import Parameter, at
from llm_jepa_jax.checkpoint.safetensors import StoredTensor
from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS
from llm_jepa_jax.config import Config
from llm_jepa_jax.models.lora import frozen_dtype, stored
from llm_jepa_jax.models.transformer import abstract_params
from llm_jepa_jax.parallel.sharding import parameter_spec

Keep = Callable[[jax.Array], Any]
"""What becomes of a parameter, or of one layer's part of it: an array, or a tree of arrays with its axes."""


def read_parameters(
    checkpoint: HfCheckpoint, mesh: Mesh, param_dtype: Any, vocab_size: int, frozen_of: Config | None = None
) -> Any:
    """The model's parameters in `param_dtype`, sharded over the mesh; rows of the vocabulary beyond the file's are 0.

    Frozen ones of a run with adapters, `frozen_of`, come as that keeps them. Every process takes part. It holds what
    its devices own, and its rows of one tensor while they are on their way.

    Raises:
        UserError: a file cannot be read, or ends too early.
    """
    axes = abstract_params(checkpoint.model, param_dtype)[1]
    tree: dict[str, Any] = {}
    for parameter in checkpoint.parameters:
        node, (*sections, name) = tree, parameter.path.split("/")
        for section in sections:
            node = node.setdefault(section, {})
        names = at(axes, parameter.path)
        sharding = NamedSharding(mesh, parameter_spec(names))
        dtype = frozen_dtype(frozen_of, names) if frozen_of else jnp.dtype(param_dtype)
        keep = functools.partial(stored, frozen_of, names) if frozen_of else lambda array: array
        node[name] = _read(checkpoint, parameter, sharding, dtype, vocab_size, keep)
    return tree


def _read(
    checkpoint: HfCheckpoint, parameter: Parameter, sharding: NamedSharding, dtype: Any, vocab_size: int, keep: Keep
) -> Any:
    tensors, stacked_axes = [checkpoint.tensors[name] for name in parameter.names], min(parameter.num_layers, 1)
    cuts = _cuts(parameter, sharding, stacked_axes)
    arrange, exchange = _arranged(parameter, dtype, vocab_size), _exchange(sharding.mesh, cuts)

    def ours(rows: jax.Array) -> jax.Array:
        return arrange(exchange(rows))

    if not parameter.num_layers:
        return jax.jit(ours, out_shardings=sharding)(_rows(parameter, tensors[0], cuts, sharding.mesh))
    kept = jax.eval_shape(keep, jax.ShapeDtypeStruct(parameter.shape, dtype))
    stacked = jax.jit(
        lambda: jax.tree.map(lambda one: jnp.zeros((len(tensors), *one.shape), one.dtype), kept), out_shardings=sharding
    )()
    put = jax.jit(
        lambda stack, rows, i: jax.tree.map(lambda all_, one: all_.at[i].set(one), stack, keep(ours(rows))),
        donate_argnums=0, out_shardings=sharding,
    )  # fmt: skip
    for number, tensor in enumerate(tensors):
        # Waiting keeps one layer on its way instead of all of them.
        stacked = jax.block_until_ready(put(stacked, _rows(parameter, tensor, cuts, sharding.mesh), number))
    return stacked


def _cuts(parameter: Parameter, sharding: NamedSharding, skipped: int) -> list[tuple[str, ...]]:
    """The mesh axes that rows and columns of a tensor are cut over in the end, once its layers are taken apart."""
    spec = (*sharding.spec, *(None,) * len(parameter.shape))[skipped : skipped + len(parameter.shape)]
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in parameter.published_axes(spec)]


def _order(mesh: Mesh, cuts: list[tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """All mesh axes: those that rows are cut over in the end, those that nothing is, those that columns are."""
    rows, columns = (*cuts, ())[:2]
    return rows, tuple(axis for axis in mesh.axis_names if axis not in (*rows, *columns)), columns


def _exchange(mesh: Mesh, cuts: list[tuple[str, ...]]) -> Callable[[jax.Array], jax.Array]:
    """From rows that are cut over all devices to rows and columns that are cut as wanted."""
    rows, rest, columns = _order(mesh, cuts)

    def local(part: jax.Array) -> jax.Array:
        if columns:
            part = jax.lax.all_to_all(part, columns, split_axis=1, concat_axis=0, tiled=True)
        return jax.lax.all_gather(part, rest, axis=0, tiled=True) if rest else part

    specs = PartitionSpec((*rows, *rest, *columns)), PartitionSpec(*(axes or None for axes in cuts))
    return jax.shard_map(local, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def _rows(parameter: Parameter, tensor: StoredTensor, cuts: list[tuple[str, ...]], mesh: Mesh) -> jax.Array:
    """What a tensor holds of a parameter, as published and stored, cut over all devices; 0 behind the last row."""
    first, count, *columns = _published(parameter)
    shape = (-(-count // mesh.size) * mesh.size, *columns)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        known = slice(first + min(start, count), first + min(stop, count))
        rows = tensor.read((known, *(slice(0, size) for size in columns)))
        room = (stop - start) - len(rows)
        return np.pad(rows, [(0, room)] + [(0, 0)] * len(columns)) if room else rows

    everywhere = NamedSharding(mesh, PartitionSpec(sum(_order(mesh, cuts), ())))
    return jax.make_array_from_callback(shape, everywhere, part, dtype=tensor.dtype)


def _published(parameter: Parameter) -> tuple[int, ...]:
    """The first row that a parameter has in its tensors, how many it has, and how many columns."""
    spans = [s.indices(s.stop) for s in parameter.published_index(_whole(parameter))]
    return (spans[0][0], *(stop - start for start, stop, _ in spans))


def _whole(parameter: Parameter) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in parameter.shape)


def _arranged(parameter: Parameter, dtype: Any, vocab_size: int) -> Callable[[jax.Array], jax.Array]:
    """From a parameter's rows to the parameter of one layer, with `vocab_size` places for tokens where it has such."""
    axis, count = VOCABULARY_AXIS.get(parameter.path), _published(parameter)[1]

    def ours(rows: jax.Array) -> jax.Array:
        array = parameter.from_published(rows[:count], _whole(parameter)).astype(dtype)
        if axis is None or vocab_size == parameter.shape[axis]:
            return array
        return jnp.pad(array, [(0, (vocab_size - size) * (i == axis)) for i, size in enumerate(array.shape)])

    return ours
