# SPDX-License-Identifier: Apache-2.0
"""Published weights straight into the final sharding: each process reads the parts its devices hold, layer by layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jepa_jax.checkpoint.hf_directory import HfCheckpoint
from llm_jepa_jax.checkpoint.hf_layout import Index, Parameter, at
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

    Frozen ones of a run with adapters, `frozen_of`, come as that keeps them. A process holds what its devices own, and
    the parts of one layer's tensor while they are on their way.
    """
    axes = abstract_params(checkpoint.model, param_dtype)[1]
    tree: dict[str, Any] = {}
    for parameter in checkpoint.parameters:
        node, name = tree, parameter.path
        if parameter.num_layers:
            node, name = tree.setdefault("layers", {}), name.partition("/")[2]
        names = at(axes, parameter.path)
        sharding = NamedSharding(mesh, parameter_spec(names))
        dtype = frozen_dtype(frozen_of, names) if frozen_of else jnp.dtype(param_dtype)
        keep = functools.partial(stored, frozen_of, names) if frozen_of else lambda array: array
        node[name] = _read(checkpoint, parameter, sharding, dtype, vocab_size, keep)
    return tree


def _read(
    checkpoint: HfCheckpoint, parameter: Parameter, sharding: NamedSharding, dtype: Any, vocab_size: int, keep: Keep
) -> Any:
    tensors = [checkpoint.tensors[name] for name in parameter.names]
    if not parameter.num_layers:
        return _tensor(parameter, tensors[0], sharding, dtype, vocab_size)
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    kept = jax.eval_shape(keep, jax.ShapeDtypeStruct(parameter.shape, dtype))
    put = jax.jit(
        lambda stack, layer, i: jax.tree.map(lambda all_, one: all_.at[i].set(one), stack, keep(layer)),
        donate_argnums=0, out_shardings=sharding,
    )  # fmt: skip
    stacked = jax.jit(
        lambda: jax.tree.map(lambda one: jnp.zeros((len(tensors), *one.shape), one.dtype), kept), out_shardings=sharding
    )()
    for number, tensor in enumerate(tensors):
        # Waiting keeps one layer on its way instead of all of them.
        stacked = jax.block_until_ready(put(stacked, _tensor(parameter, tensor, of_layer, dtype, vocab_size), number))
    return stacked


def _tensor(
    parameter: Parameter, tensor: StoredTensor, sharding: NamedSharding, dtype: Any, vocab_size: int
) -> jax.Array:
    """One tensor, of which only the parts of this process's devices are read."""
    shape, axis = list(parameter.shape), VOCABULARY_AXIS.get(parameter.path)
    if axis is not None:
        shape[axis] = vocab_size

    def part(index: Index) -> np.ndarray:
        known = tuple(
            slice(*(min(end, size) for end in s.indices(whole)[:2]))
            for s, size, whole in zip(index, parameter.shape, shape, strict=True)
        )
        array = parameter.from_published(tensor.read(parameter.published_index(known)), known).astype(dtype)
        room = [len(range(*s.indices(whole))) - size for s, whole, size in zip(index, shape, array.shape, strict=True)]
        return np.pad(array, [(0, more) for more in room]) if any(room) else array

    return jax.make_array_from_callback(tuple(shape), sharding, part, dtype=dtype)
