# SPDX-License-Identifier: Apache-2.0
"""Rows with branches that are cut over the mesh: each part of the trunk has its share of the branches right behind it.

A batch has all branches behind the whole trunk. Cut into equal parts, that order would put a part on two devices, and
every layer would move it. Woven, trunk and branches come apart and together again without leaving a device.
"""

import math

import jax
import jax.numpy as jnp

from llm_jepa_jax.parallel.sharding import length_parts


def join(trunk: jax.Array, branches: jax.Array, axis: int = 1) -> jax.Array:
    """Along an axis, L trunk places and B of branches as T = L + B, woven where L is cut; B then divides as L does."""
    parts = length_parts(trunk.shape[axis])
    if parts == 1 or not branches.shape[axis]:
        return jnp.concatenate([trunk, branches], axis)
    before, behind = trunk.shape[:axis], trunk.shape[axis + 1 :]
    both = [array.reshape(*before, parts, -1, *behind) for array in (trunk, branches)]
    return jnp.concatenate(both, axis + 1).reshape(*before, -1, *behind)


def split(array: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """What `join` has joined along axis 1: [R, L, ...] and [R, B, ...]."""
    parts = length_parts(length)
    if parts == 1 or array.shape[1] == length:
        return array[:, :length], array[:, length:]
    rows, width, *rest = array.shape
    cut = array.reshape(rows, parts, width // parts, *rest)
    own = length // parts
    return cut[:, :, :own].reshape(rows, length, *rest), cut[:, :, own:].reshape(rows, width - length, *rest)


def with_spare_branch(tokens_RxL: jax.Array, positions_RxL: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows without branches, as `weave` takes them, with a branch of one token that nothing reads. For TPUs.

    Of rows of a multiple of 128 tokens their compilers lay the residual stream with tokens closest together, and copy
    what the layers keep into another order and back: 4 of 38 ms a layer (`llama8b` on v6e, libtpu 0.0.42). One token
    more, and they do not.
    """
    spare = ((0, 0), (0, 1))
    return jnp.pad(tokens_RxL, spare), jnp.pad(positions_RxL, spare), jnp.zeros_like(tokens_RxL[:, :1])


def weave(
    tokens_RxT: jax.Array, positions_RxT: jax.Array, branch_end_RxP: jax.Array | None, length: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Tokens, positions and ends of branches of a batch, woven where its rows of `length` tokens are cut.

    Slots of branches are added until their tokens divide; nothing reads what comes of them.
    """
    parts, num_branches = length_parts(length), tokens_RxT.shape[1] - length
    if parts == 1 or branch_end_RxP is None or not num_branches:
        return tokens_RxT, positions_RxT, branch_end_RxP
    num_pairs = branch_end_RxP.shape[1]
    size = num_branches // num_pairs
    added = -num_pairs % (parts // math.gcd(parts, size))

    def woven(array: jax.Array) -> jax.Array:
        return join(array[:, :length], jnp.pad(array[:, length:], ((0, 0), (0, added * size))))

    return woven(tokens_RxT), woven(positions_RxT), jnp.pad(branch_end_RxP, ((0, 0), (0, added)))


def unweave(array: jax.Array, length: int, width: int) -> jax.Array:
    """[R, T, ...] in the order of the batch, of what `weave` has made [R, T', ...]; T is `width`."""
    if length_parts(length) == 1 or array.shape[1] == length:
        return array[:, :width]
    trunk, branches = split(array, length)
    return jnp.concatenate([trunk, branches[:, : width - length]], axis=1)
