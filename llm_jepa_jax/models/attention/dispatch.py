# SPDX-License-Identifier: Apache-2.0
"""Attention of whole rows: the trunk by the chosen back end, and the branches behind it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.attention import dense, splash, triton, xla
from llm_jepa_jax.models.weaving import join, split
from llm_jepa_jax.parallel.sharding import LENGTH_AXIS, activation_spec, constrain, length_parts
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
    (query, branch_query), (key, _), (value, _) = (
        split(array, length) for array in (query_RxTxHxh, key_RxTxKxh, value_RxTxKxh)
    )
    trunk = attend(query, key, value, segments_RxL, backend, longest_segment, window, soft_cap, windowed)
    size = query_RxTxHxh.shape[1] - length
    if not size:
        return trunk
    allowed = _branch_mask(segments_RxL, branch_end_RxP, size, xla.seen_back(window, windowed))
    # Few queries go to all parts of the row, not its keys to them.
    branch_query = constrain(branch_query, "rows", "whole_length", "heads", "head_dim")
    branches = dense.attend_masked(branch_query, key_RxTxKxh, value_RxTxKxh, allowed, soft_cap)
    return join(trunk, branches)


def _branch_mask(segments_RxL: jax.Array, branch_end_RxP: jax.Array, size: int, seen: Any) -> jax.Array:
    """bool [R, B, L + B]: what the B = P·k branch tokens of a row attend to, keys joined as the row's are. They follow
    `branch_end` in a window.
    """
    rows, length = segments_RxL.shape
    k = size // branch_end_RxP.shape[1]
    parent_RxP = jnp.take_along_axis(constrain(segments_RxL, "rows", "whole_length"), branch_end_RxP, axis=1)
    in_segment_RxPxL = segments_RxL[:, None, :] == parent_RxP[:, :, None]
    before_RxPxL = branch_end_RxP[:, :, None] - jnp.arange(length)
    prefix_RxBxL = jnp.repeat(in_segment_RxPxL & (before_RxPxL >= 0), k, axis=1)
    slots_B = jnp.arange(size)
    back_BxB = slots_B[:, None] - slots_B
    own_BxB = (slots_B[:, None] // k == slots_B // k) & (back_BxB >= 0)
    if seen is not None:
        back_RxBxL = jnp.repeat(before_RxPxL, k, axis=1) + (slots_B % k + 1)[:, None]
        prefix_RxBxL, own_BxB = prefix_RxBxL & (back_RxBxL < seen), own_BxB & (back_BxB < seen)
    return join(prefix_RxBxL, jnp.broadcast_to(own_BxB, (rows, size, size)), axis=2)


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
    length, _, width = query_RxLxHxh.shape[1:]
    parts = length_parts(length)
    if backend == "xla" and parts == 1:
        return xla.attend(*arrays, longest_segment, window, soft_cap, windowed)
    if backend != "xla":
        refusal = attention_refusal(backend, length, width, query_RxLxHxh.dtype.name, window, soft_cap, parts)
        if refusal:
            raise UserError(f"config: {refusal}")
    if backend == "triton":
        return on_shards(triton.attend, *arrays)

    def within(window: int) -> Callable[..., jax.Array]:
        """Attention of a layer with this window."""
        kernel = functools.partial(KERNELS[backend], longest_segment=longest_segment, window=window, soft_cap=soft_cap)
        return functools.partial(on_shards, kernel, reach=min(longest_segment or length, window or length))

    if windowed is None:
        return within(window)(*arrays)
    # What a kernel skips, and how far keys travel, is compiled into it, so there are two of them; a layer runs one.
    return jax.lax.cond(windowed, within(window), within(0), *arrays)


KERNELS = {"xla": xla.attend, "splash": splash.attend}
"""Those that take more keys than queries."""


def on_shards(
    kernel: Callable[..., jax.Array],
    query_RxLxHxh: jax.Array,
    key_RxLxKxh: jax.Array,
    value_RxLxKxh: jax.Array,
    segments_RxL: jax.Array,
    reach: int = 0,
) -> jax.Array:
    """Runs a kernel that XLA cannot cut on each device's rows, part of the row and heads, under the mesh of
    `jax.set_mesh` if any. `reach` is how many tokens back any query sees, its own included; 0: all.
    """
    arrays = (query_RxLxHxh, key_RxLxKxh, value_RxLxKxh, segments_RxL)
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays)
    length = segments_RxL.shape[1]
    parts = length_parts(length)
    cut = "length" if parts > 1 else None
    if cut:
        back = -(-(min(reach or length, length) - 1) // (length // parts))
        kernel = functools.partial(_on_part, kernel, min(back, parts - 1))
    by_head, by_kv_head = (activation_spec("rows", cut, axis) for axis in ("heads", "kv_heads"))
    specs = (by_head, by_kv_head, by_kv_head, activation_spec("rows"))
    # A kernel's outputs do not say over which axes they vary, so that check has nothing to go by.
    return jax.shard_map(kernel, in_specs=specs, out_specs=by_head, check_vma=False)(*arrays)


def _on_part(
    kernel: Callable[..., jax.Array],
    back: int,
    query_RxQxHxh: jax.Array,
    key_RxQxKxh: jax.Array,
    value_RxQxKxh: jax.Array,
    segments_RxL: jax.Array,
) -> jax.Array:
    """On one device, whose queries see into `back` parts of the row before their own.

    Every device computes as much as the last: the first ones have places without keys where others have earlier parts.
    The step waits for the last device anyway, and so the kernel's mask is the same everywhere.
    """
    size = query_RxQxHxh.shape[1]
    key_RxSxKxh, value_RxSxKxh = (_with_parts_before(array, back) for array in (key_RxQxKxh, value_RxQxKxh))
    led = jnp.pad(segments_RxL, ((0, 0), (back * size, 0)), constant_values=-1)
    start = jax.lax.axis_index(LENGTH_AXIS) * size
    segments_RxS = jax.lax.dynamic_slice_in_dim(led, start, (back + 1) * size, axis=1)
    return kernel(query_RxQxHxh, key_RxSxKxh, value_RxSxKxh, segments_RxS)


def _with_parts_before(array: jax.Array, back: int) -> jax.Array:
    """This device's part behind the `back` parts before it, handed on from device to device; zeros before the row."""
    parts, num_parts = [array], jax.sharding.get_abstract_mesh().shape[LENGTH_AXIS]
    for _ in range(back):
        parts.append(jax.lax.ppermute(parts[-1], LENGTH_AXIS, [(i, i + 1) for i in range(num_parts - 1)]))
    return jnp.concatenate(parts[::-1], axis=1)
