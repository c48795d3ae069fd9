# SPDX-License-Identifier: Apache-2.0
"""Causal attention within segments on every platform, one block of queries and keys at a time.

The softmax is kept running over the blocks of keys (Rabe & Staats, 2021; Dao et al., 2022), so neither pass holds more
scores than those of one pair of blocks. Blocks that no segment shares are never visited; that is found from the
segments of the batch when the step runs. Shapes: n blocks of B tokens; R, K, h as ever; G query heads share a key head.
Where a row is cut into parts, a device has the queries of one and the keys of those before it too: Q of S places.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.models.attention.dense import MASKED, attend_masked

BLOCK, FAR_BLOCK = 64, 256
"""Queries and keys of a block. A pair of short blocks stays in a CPU core's cache and follows segments closely; where
queries look further than `FAR`, fewer and longer blocks cost less."""
FAR = 2048


def attend(
    query_RxQxHxh: jax.Array,
    key_RxSxKxh: jax.Array,
    value_RxSxKxh: jax.Array,
    segments_RxS: jax.Array,
    longest_segment: int = 0,
    window: int = 0,
    soft_cap: float = 0.0,
    windowed: jax.Array | None = None,
) -> jax.Array:
    """Each query attends to earlier keys (and its own) of its own segment; [R, Q, H, h] in the type of the values.

    Queries are those of the last Q of S places: all of them in a whole row. Segments below 0 are places without keys.
    `longest_segment` is a promise (0: none): no segment has more tokens. `window` (0: off) is how many tokens back,
    its own included, a query sees; `windowed` (a bool scalar, None: yes) says whether this layer has it, when the step
    runs. `soft_cap` (0: off) turns scores into cap * tanh(scores / cap). Query heads share keys in consecutive groups.
    Padding (segment 0) attends to padding: finite, and nothing else reads it.
    """
    rows, num_queries, heads, width = query_RxQxHxh.shape
    length, sight = segments_RxS.shape[1], seen_back(window, windowed)
    before = length - num_queries
    if length <= BLOCK:
        near_QxS = _near(0, length, sight)[before:]
        allowed_RxQxS = near_QxS & (segments_RxS[:, before:, None] == segments_RxS[:, None, :])
        return attend_masked(query_RxQxHxh, key_RxSxKxh, value_RxSxKxh, allowed_RxQxS, soft_cap)
    reach = min(longest_segment or length, window if window and windowed is None else length)
    block = BLOCK if reach <= FAR else FAR_BLOCK
    kv_heads, lead = key_RxSxKxh.shape[2], -before % block

    def cut(array: jax.Array, lead: int = lead, fill: int = 0) -> jax.Array:
        """[R, S, ...] to [n, R, B, ...]; `lead` places come before it, so that blocks of queries begin as keys' do."""
        behind = -(lead + array.shape[1]) % block
        led = jnp.pad(array, [(0, 0), (lead, 0)] + [(0, 0)] * (array.ndim - 2), constant_values=fill)
        led = jnp.pad(led, [(0, 0), (0, behind)] + [(0, 0)] * (array.ndim - 2))
        return led.reshape(rows, -1, block, *array.shape[2:]).swapaxes(0, 1)

    query = cut(query_RxQxHxh * width**-0.5, 0).reshape(-1, rows, block, kv_heads, heads // kv_heads, width)
    key, value = (cut(array).transpose(0, 1, 3, 2, 4) for array in (key_RxSxKxh, value_RxSxKxh))
    segments = cut(segments_RxS, fill=-1)
    first = first_blocks(segments, reach if sight is None else jnp.minimum(sight, reach))[len(key) - len(query) :]
    mixed = _blocked(query.transpose(0, 1, 3, 4, 2, 5), key, value, segments, first, sight, soft_cap)
    return mixed.transpose(1, 0, 4, 2, 3, 5).reshape(rows, -1, heads, width)[:, :num_queries]


def seen_back(window: int, windowed: jax.Array | None) -> int | jax.Array | None:
    """How many tokens back a query sees, its own included; None: all. The arguments are those of `attend`."""
    if not window or windowed is None:
        return window or None
    return jnp.where(windowed, window, jnp.iinfo(jnp.int32).max)


def _near(back: Any, size: int, sight: Any) -> Any:
    """bool [B, B]: which keys of a block a query may see, its block beginning `back` tokens behind theirs."""
    back_BxB = back + np.arange(size)[:, None] - np.arange(size)
    return back_BxB >= 0 if sight is None else (back_BxB >= 0) & (back_BxB < sight)


def first_blocks(segments_nxRxB: jax.Array, reach: int | jax.Array) -> jax.Array:
    """int32 [n]: the first block of keys that each block of queries needs, in any row.

    Blocks whose ranges of segments overlap may share one; padding, which stands behind them all, counts as the last.
    """
    num_blocks, _, block = segments_nxRxB.shape
    order = jnp.where(segments_nxRxB != 0, segments_nxRxB, jnp.iinfo(jnp.int32).max)
    low_nxR, high_nxR = order.min(axis=2), order.max(axis=2)
    shared_nxn = ((high_nxR[None] >= low_nxR[:, None]) & (low_nxR[None] <= high_nxR[:, None])).any(axis=2)
    blocks_n = np.arange(num_blocks)
    within_nxn = blocks_n >= (blocks_n[:, None] * block - (reach - 1)) // block
    return jnp.argmax(shared_nxn & within_nxn, axis=1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blocked(
    query_nxRxKxGxBxh: jax.Array,
    key_nxRxKxBxh: jax.Array,
    value_nxRxKxBxh: jax.Array,
    segments_nxRxB: jax.Array,
    first_n: jax.Array,
    sight: int | jax.Array | None,
    soft_cap: float,
) -> jax.Array:
    """Mixed values, [n, R, K, G, B, h]; `first_n` from `first_blocks`, `sight` tokens back or all."""
    return _forward(query_nxRxKxGxBxh, key_nxRxKxBxh, value_nxRxKxBxh, segments_nxRxB, first_n, sight, soft_cap)[0]


def _scores(
    query: jax.Array, key: jax.Array, segments: tuple[jax.Array, jax.Array], back: jax.Array, sight: Any, cap: float
) -> tuple[jax.Array, Any]:
    """Scores [R, K, G, Q, S] of two blocks `back` tokens apart, float32, and the slope that a soft cap gave them."""
    scores, slope = jnp.einsum("rkgqh,rksh->rkgqs", query, key, preferred_element_type=jnp.float32), 1.0
    if cap:
        capped = jnp.tanh(scores / cap)
        scores, slope = cap * capped, 1.0 - capped * capped
    allowed_RxQxS = _near(back, key.shape[-2], sight) & (segments[0][:, :, None] == segments[1][:, None, :])
    return jnp.where(allowed_RxQxS[:, None, None], scores, MASKED), slope


def _query_blocks(query: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each block of queries, which block of keys has its places, and their segments."""
    before = len(segments) - len(query)
    return jnp.arange(before, len(segments)), segments[before:]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    first_n: jax.Array,
    sight: Any,
    soft_cap: float,
) -> tuple[jax.Array, Any]:
    block_size = key.shape[-2]

    def mix(block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """Values mixed for one block of queries, and the logarithm of its softmax denominators."""
        i, segments_i, first, query_i = block

        def add(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            mixed, total, top = carry
            scores, _ = _scores(query_i, key[j], (segments_i, segments[j]), (i - j) * block_size, sight, soft_cap)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            shares, kept = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            here = jnp.einsum(
                "rkgqs,rksh->rkgqh", shares.astype(value.dtype), value[j], preferred_element_type=jnp.float32
            )
            return mixed * kept[..., None] + here, total * kept + shares.sum(axis=-1), new_top

        places = query_i.shape[:-1]
        start = (jnp.zeros(query_i.shape, jnp.float32), jnp.zeros(places), jnp.full(places, MASKED))
        mixed, total, top = jax.lax.fori_loop(first, i + 1, add, start)
        return (mixed / total[..., None]).astype(value.dtype), top + jnp.log(total)

    mixed, log_total = jax.lax.map(mix, (*_query_blocks(query, segments), first_n, query))
    return mixed, (query, key, value, segments, first_n, sight, mixed, log_total)


def _backward(soft_cap: float, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    query, key, value, segments, first_n, sight, mixed, log_total = saved
    block_size = key.shape[-2]

    def spread(carry: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]) -> Any:
        """Adds what one block of queries gives to the gradients of keys and values; returns its own."""
        i, segments_i, first, query_i, mixed_i, log_total_i, grad_i = block
        pull = jnp.sum(grad_i.astype(jnp.float32) * mixed_i.astype(jnp.float32), axis=-1, keepdims=True)

        def add(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            by_query, by_key, by_value = carry
            scores, slope = _scores(query_i, key[j], (segments_i, segments[j]), (i - j) * block_size, sight, soft_cap)
            shares = jnp.exp(scores - log_total_i[..., None])
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            by_share = product("rkgqh,rksh->rkgqs", grad_i, value[j])
            by_score = (shares * (by_share - pull) * slope).astype(query.dtype)
            by_query += product("rkgqs,rksh->rkgqh", by_score, key[j])
            by_key = by_key.at[j].add(product("rkgqs,rkgqh->rksh", by_score, query_i))
            by_value = by_value.at[j].add(product("rkgqs,rkgqh->rksh", shares.astype(grad.dtype), grad_i))
            return by_query, by_key, by_value

        start = (jnp.zeros(query_i.shape, jnp.float32), *carry)
        by_query, by_key, by_value = jax.lax.fori_loop(first, i + 1, add, start)
        return (by_key, by_value), by_query.astype(query.dtype)

    zeros = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    blocks = (*_query_blocks(query, segments), first_n, query, mixed, log_total, grad)
    (by_key, by_value), by_query = jax.lax.scan(spread, zeros, blocks)
    return by_query, by_key.astype(key.dtype), by_value.astype(value.dtype), None, None, None


_blocked.defvjp(_forward, _backward)
