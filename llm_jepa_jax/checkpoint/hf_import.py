# SPDX-License-Identifier: Apache-2.0
"""Published weights straight into the final sharding: each process reads the parts its devices hold, layer by layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jepa_jax.checkpoint.hf_directory import HfCheckpoint
from llm_jepa_jax.checkpoint.hf_layout import Index, Parameter, at
from llm_jepa_jax.checkpoint.safetensors import StoredTensor
from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS
from llm_jepa_jax.models.transformer import abstract_params
from llm_jepa_jax.parallel.sharding import parameter_shardings


def read_parameters(checkpoint: HfCheckpoint, mesh: Mesh, param_dtype: Any, vocab_size: int) -> Any:
    """The model's parameters in `param_dtype`, sharded over the mesh; rows of the vocabulary beyond the file's are 0.

    A process holds what its devices own, and the parts of one layer's tensor while they are on their way.
    """
    shardings = parameter_shardings(mesh, abstract_params(checkpoint.model, param_dtype)[1])
    tree: dict[str, Any] = {}
    for parameter in checkpoint.parameters:
        node, (*sections, name) = tree, parameter.path.split("/")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = _read(checkpoint, parameter, at(shardings, parameter.path), jnp.dtype(param_dtype), vocab_size)
    return tree


def _read(
    checkpoint: HfCheckpoint, parameter: Parameter, sharding: NamedSharding, dtype: Any, vocab_size: int
) -> jax.Array:
    tensors = [checkpoint.tensors[name] for name in parameter.names]
    if not parameter.num_layers:
        return _tensor(parameter, tensors[0], sharding, dtype, vocab_size)
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    shape = (len(tensors), *parameter.shape)
    stacked = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    put = jax.jit(lambda stack, layer, i: stack.at[i].set(layer), donate_argnums=0, out_shardings=sharding)
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
