# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays that do not depend on how they are sharded or stored, computed on the devices.

The checksum of an array is two sums modulo 2^32 over its elements: bits, taken as an integer, times an odd number drawn
from the element's place. An odd number has an inverse, so one changed element, whatever changed in it, changes both
sums; several are missed with a chance of about 2^-62. They are exact in any order: all meshes find the same sums.
"""

import json
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS

SEEDS = (0x9E3779B9, 0x85EBCA6B)
SHOWN = 3
"""How many arrays an error names."""


class Damage(Exception):
    """What a checkpoint holds is not what was saved."""


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """Type, shape and checksum of every array of a tree, by its path: JSON. The same on all processes."""
    found = named_leaves(tree)
    sums_Nx2 = np.asarray(_sums(list(found.values())))
    return {
        name: {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "sum": f"{first:08x}{second:08x}"}
        for (name, leaf), (first, second) in zip(found.items(), sums_Nx2.tolist(), strict=True)
    }


def check(tree: Any, saved: dict[str, dict[str, Any]]) -> None:
    """Compares arrays with what `describe` said of them when they were saved.

    Raises:
        Damage: they differ; the first few are named.
    """
    wrong = [name for name, words in describe(tree).items() if saved[name] != words]
    if wrong:
        raise Damage(f"the checksums of {len(wrong)} arrays are wrong: {', '.join(wrong[:SHOWN])}")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as `params/layers/attention/query`."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Sequence[Any]) -> str:
    parts = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)
    return "/".join(map(str, parts))


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """The two sums of each array, uint32 [N, 2]."""
    return jnp.array([[_sum(leaf, seed) for seed in SEEDS] for leaf in leaves], jnp.uint32).reshape(-1, 2)


def _sum(array: jax.Array, seed: int) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = array if array.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(array, width)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (_mixed(place + np.uint32(seed)) | np.uint32(1)), dtype=jnp.uint32)


def _mixed(number: jax.Array) -> jax.Array:
    """A permutation of uint32 each of whose bits depends on all (`lowbias32` of C. Wellons' hash prospector)."""
    number = (number ^ (number >> 16)) * np.uint32(0x7FEB352D)
    number = (number ^ (number >> 15)) * np.uint32(0x846CA68B)
    return number ^ (number >> 16)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """JSON with a checksum of its own."""
    return {"content": content, "crc32": _crc32(content)}


def opened(values: Any) -> dict[str, Any]:
    """The content of what `sealed` gave.

    Raises:
        Damage: it is something else.
    """
    if not isinstance(values, dict) or values.keys() != {"content", "crc32"}:
        raise Damage("the settings beside the arrays have no checksum")
    if values["crc32"] != _crc32(values["content"]):
        raise Damage("the checksum of the settings beside the arrays is wrong")
    return values["content"]


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def as_saved(abstract: Any, saved: dict[str, dict[str, Any]]) -> Any:
    """The arrays to read for those that are wanted: in the type they were saved in, and the padding of that time.

    Raises:
        Damage: some were not saved, or in another shape.
    """

    def stored(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = _name(path)
        if name not in saved:
            raise Damage(f"it has no {name}")
        axis = VOCABULARY_AXIS.get(str(getattr(path[-1], "key", None)))
        shape, sizes = tuple(saved[name]["shape"]), list(leaf.shape)
        if axis is not None and len(shape) == len(sizes) > axis:
            sizes[axis] = shape[axis]
        if shape != tuple(sizes):
            raise Damage(f"{name} is {shape}, not {leaf.shape}")
        sharding = leaf.sharding if shape == leaf.shape else _without(leaf.sharding, axis, shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(saved[name]["dtype"]), sharding=sharding)

    return jax.tree_util.tree_map_with_path(stored, abstract)


def _without(sharding: Any, axis: int | None, shape: tuple[int, ...]) -> Any:
    """The sharding, without an axis that it cannot cut evenly."""
    try:
        sharding.shard_shape(shape)
        return sharding
    except ValueError:
        spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
        return NamedSharding(sharding.mesh, PartitionSpec(*(None if i == axis else s for i, s in enumerate(spec))))


def as_wanted(tree: Any, abstract: Any) -> Any:
    """The arrays in the type and with the padding that are wanted."""
    return jax.tree.map(
        lambda array, leaf: array if (array.shape, array.dtype) == (leaf.shape, leaf.dtype) else _fitted(array, leaf),
        tree,
        abstract,
    )


def _fitted(array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    def fit(array: jax.Array) -> jax.Array:
        kept = array[tuple(slice(min(sizes)) for sizes in zip(array.shape, leaf.shape, strict=True))]
        room = [(0, size - have) for have, size in zip(kept.shape, leaf.shape, strict=True)]
        return jnp.pad(kept, room).astype(leaf.dtype)

    return jax.jit(fit, out_shardings=leaf.sharding)(array)
