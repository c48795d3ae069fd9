# SPDX-License-Identifier: Apache-2.0
"""Causal attention within segments in blocks, on every platform, with any window and soft cap."""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of a forbidden place: finite, so that a row of padding gives no NaN."""
QUERY_BLOCK = 256
"""Queries whose scores exist at one time."""
LOCAL_BLOCK = 32
"""Queries that look at the same keys where attention does not reach far: smaller blocks see fewer keys in vain."""
LOCAL_REACH = 512
"""Furthest reach of local blocks: they copy every key once for each block that sees it, and keep all their scores."""


def attend(
    query_RxLxHxh: jax.Array,
    key_RxLxKxh: jax.Array,
    value_RxLxKxh: jax.Array,
    segments_RxL: jax.Array,
    longest_segment: int = 0,
    window: int = 0,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Each query attends to earlier keys (and its own) of its own segment; [R, L, H, h] in the type of the values.

    `longest_segment` is a promise (0: none): no segment has more tokens. `window` (0: off) is how many tokens back,
    its own included, a query sees. `soft_cap` (0: off) turns scores into cap * tanh(scores / cap).

    Scores never take L² memory. Where the promise or the window keeps queries from looking far, short blocks of them
    see their own block and those within reach, in one product; otherwise longer blocks follow one another, each
    against the keys within reach, with scores computed again in the backward pass. Padding (segment 0) attends to
    padding: its outputs are finite, and nothing else reads them.
    """
    length = query_RxLxHxh.shape[1]
    arrays = (query_RxLxHxh, key_RxLxKxh, value_RxLxKxh, segments_RxL)
    reach = min(longest_segment or length, window or length)
    back = -(-(reach - 1) // LOCAL_BLOCK)
    if reach <= LOCAL_REACH and (back + 1) * LOCAL_BLOCK < length:
        return _attend_locally(*arrays, max(back, 1), window, soft_cap)
    if length <= QUERY_BLOCK:
        return _causal_block(*arrays, segments_RxL, start=0, window=window, soft_cap=soft_cap)
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        first = max(start - back * LOCAL_BLOCK, 0)
        query, key, value, segments = (array[:, first:end] for array in arrays)
        attend_block = functools.partial(_causal_block, start=start - first, window=window, soft_cap=soft_cap)
        own = slice(start - first, None)
        outputs.append(jax.checkpoint(attend_block)(query[:, own], key, value, segments, segments[:, own]))
    return jnp.concatenate(outputs, axis=1)


def _attend_locally(
    query_RxLxHxh: jax.Array,
    key_RxLxKxh: jax.Array,
    value_RxLxKxh: jax.Array,
    segments_RxL: jax.Array,
    back: int,
    window: int,
    soft_cap: float,
) -> jax.Array:
    """Attention that reaches no further than `back` blocks: each block of queries sees those and its own."""
    rows, length = segments_RxL.shape
    block, num_blocks = LOCAL_BLOCK, -(-length // LOCAL_BLOCK)

    def cut(array: jax.Array) -> jax.Array:
        """[R, L, ...] to [R, blocks, block, ...]; what is added has segment 0."""
        room = [(0, 0), (0, num_blocks * block - length)] + [(0, 0)] * (array.ndim - 2)
        return jnp.pad(array, room).reshape(rows, num_blocks, block, *array.shape[2:])

    def with_previous(blocks: jax.Array) -> jax.Array:
        """[R, blocks, block, ...] to [R * blocks, (back + 1) * block, ...]: each behind the ones before it."""
        padded = jnp.pad(blocks, [(0, 0), (back, 0)] + [(0, 0)] * (blocks.ndim - 2))
        seen = [padded[:, i : i + num_blocks] for i in range(back + 1)]
        return jnp.concatenate(seen, axis=2).reshape(-1, (back + 1) * block, *blocks.shape[3:])

    query, segments = cut(query_RxLxHxh), cut(segments_RxL)
    mixed = _causal_block(
        query.reshape(-1, block, *query.shape[3:]),
        with_previous(cut(key_RxLxKxh)),
        with_previous(cut(value_RxLxKxh)),
        with_previous(segments),
        segments.reshape(-1, block),
        start=back * block,
        window=window,
        soft_cap=soft_cap,
    )
    return mixed.reshape(rows, num_blocks * block, *mixed.shape[2:])[:, :length]


def _causal_block(
    query_RxQxHxh: jax.Array,
    key_RxSxKxh: jax.Array,
    value_RxSxKxh: jax.Array,
    segments_RxS: jax.Array,
    segments_RxQ: jax.Array,
    start: int,
    window: int,
    soft_cap: float,
) -> jax.Array:
    """Q queries against S keys, the first query being at the place of key `start`."""
    back_QxS = start + jnp.arange(query_RxQxHxh.shape[1])[:, None] - jnp.arange(key_RxSxKxh.shape[1])
    near_QxS = (back_QxS >= 0) & (back_QxS < window) if window else back_QxS >= 0
    allowed_RxQxS = near_QxS & (segments_RxQ[:, :, None] == segments_RxS[:, None, :])
    return attend_masked(query_RxQxHxh, key_RxSxKxh, value_RxSxKxh, allowed_RxQxS, soft_cap)


def attend_masked(
    query_RxQxHxh: jax.Array,
    key_RxSxKxh: jax.Array,
    value_RxSxKxh: jax.Array,
    allowed_RxQxS: jax.Array,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Attention over the allowed places, softmax in float32; every query has at least one. [R, Q, H, h].

    Query heads share keys in consecutive groups (GQA); keys and values are not repeated in memory.
    """
    rows, queries, heads, width = query_RxQxHxh.shape
    kv_heads = key_RxSxKxh.shape[2]
    grouped = query_RxQxHxh.reshape(rows, queries, kv_heads, heads // kv_heads, width) * width**-0.5
    scores = jnp.einsum("rqkgh,rskh->rkgqs", grouped, key_RxSxKxh, preferred_element_type=jnp.float32)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(allowed_RxQxS[:, None, None], scores, MASKED)
    shares = jax.nn.softmax(scores, axis=-1).astype(value_RxSxKxh.dtype)
    mixed = jnp.einsum("rkgqs,rskh->rqkgh", shares, value_RxSxKxh)
    return mixed.reshape(rows, queries, heads, width)
