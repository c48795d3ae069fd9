# SPDX-License-Identifier: Apache-2.0
"""Attention of whole rows: the trunk by the chosen back end, and the branches behind it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.attention import dense, splash, triton, xla
from llm_jepa_jax.parallel.sharding import activation_spec
from llm_jepa_jax.resolve import attention_refusal


def attend_rows(
    query_RxTxHxh: jax.Array,
    key_RxTxKxh: jax.Array,
    value_RxTxKxh: jax.Array,
    segments_RxL: jax.Array,
    branch_end_RxP: jax.Array | None = None,
    backend: str = "xla",
    longest_segment: int = 0,
    window: int = 0,
    soft_cap: float = 0.0,
    windowed: jax.Array | None = None,
) -> jax.Array:
    """Attention of whole rows, [R, T, H, h]: the trunk, and the branches of k tokens behind it where T is L + P·k.

    A branch token attends to the places of one trunk segment up to its `branch_end`, and to its own branch's earlier
    tokens and itself. Nothing else attends to a branch. Branches are few: they are dense on every back end.

    Raises:
        UserError: the back end cannot do this.
    """
    length = segments_RxL.shape[1]
    query, key, value = (array[:, :length] for array in (query_RxTxHxh, key_RxTxKxh, value_RxTxKxh))
    trunk = attend(query, key, value, segments_RxL, backend, longest_segment, window, soft_cap, windowed)
    size = query_RxTxHxh.shape[1] - length
    if not size:
        return trunk
    allowed = _branch_mask(segments_RxL, branch_end_RxP, size, xla.seen_back(window, windowed))
    branches = dense.attend_masked(query_RxTxHxh[:, length:], key_RxTxKxh, value_RxTxKxh, allowed, soft_cap)
    return jnp.concatenate([trunk, branches], axis=1)


def _branch_mask(segments_RxL: jax.Array, branch_end_RxP: jax.Array, size: int, seen: Any) -> jax.Array:
    """bool [R, B, L + B]: what the B = P·k branch tokens of a row attend to. They follow `branch_end` in a window."""
    rows, length = segments_RxL.shape
    k = size // branch_end_RxP.shape[1]
    parent_RxP = jnp.take_along_axis(segments_RxL, branch_end_RxP, axis=1)
    in_segment_RxPxL = segments_RxL[:, None, :] == parent_RxP[:, :, None]
    before_RxPxL = branch_end_RxP[:, :, None] - jnp.arange(length)
    prefix_RxBxL = jnp.repeat(in_segment_RxPxL & (before_RxPxL >= 0), k, axis=1)
    slots_B = jnp.arange(size)
    back_BxB = slots_B[:, None] - slots_B
    own_BxB = (slots_B[:, None] // k == slots_B // k) & (back_BxB >= 0)
    if seen is not None:
        back_RxBxL = jnp.repeat(before_RxPxL, k, axis=1) + (slots_B % k + 1)[:, None]
        prefix_RxBxL, own_BxB = prefix_RxBxL & (back_RxBxL < seen), own_BxB & (back_BxB < seen)
    return jnp.concatenate([prefix_RxBxL, jnp.broadcast_to(own_BxB, (rows, size, size))], axis=2)


def attend(
    query_RxLxHxh: jax.Array,
    key_RxLxKxh: jax.Array,
    value_RxLxKxh: jax.Array,
    segments_RxL: jax.Array,
    backend: str = "xla",
    longest_segment: int = 0,
    window: int = 0,
    soft_cap: float = 0.0,
    windowed: jax.Array | None = None,
) -> jax.Array:
    """Each query attends to earlier keys (and its own) of its own segment, [R, L, H, h]; `xla.attend` says the rest.

    Raises:
        UserError: the back end cannot do this.
    """
    arrays = (query_RxLxHxh, key_RxLxKxh, value_RxLxKxh, segments_RxL)
    if backend == "xla":
        return xla.attend(*arrays, longest_segment, window, soft_cap, windowed)
    length, _, width = query_RxLxHxh.shape[1:]
    refusal = attention_refusal(backend, length, width, query_RxLxHxh.dtype.name, window, soft_cap)
    if refusal:
        raise UserError(f"config: {refusal}")
    if backend == "triton":
        return on_shards(triton.attend, *arrays)
    kernel = functools.partial(splash.attend, longest_segment=longest_segment, soft_cap=soft_cap)
    local = functools.partial(kernel, window=window)
    if windowed is None:
        return on_shards(local, *arrays)
    # The mask of this kernel is compiled into it, so there are two of them; a layer runs one.
    return jax.lax.cond(windowed, functools.partial(on_shards, local), functools.partial(on_shards, kernel), *arrays)


def on_shards(
    kernel: Callable[..., jax.Array],
    query_RxLxHxh: jax.Array,
    key_RxLxKxh: jax.Array,
    value_RxLxKxh: jax.Array,
    segments_RxL: jax.Array,
) -> jax.Array:
    """Runs a kernel that XLA cannot cut on each device's rows and heads, under the mesh of `jax.set_mesh` if any."""
    arrays = (query_RxLxHxh, key_RxLxKxh, value_RxLxKxh, segments_RxL)
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays)
    by_head, by_kv_head = (activation_spec("rows", "length", axis) for axis in ("heads", "kv_heads"))
    specs = (by_head, by_kv_head, by_kv_head, activation_spec("rows"))
    # A kernel's outputs do not say over which axes they vary, so that check has nothing to go by.
    return jax.shard_map(kernel, in_specs=specs, out_specs=by_head, check_vma=False)(*arrays)
