# SPDX-License-Identifier: Apache-2.0
"""Causal attention within segments, and of branches to their prefix, on every platform (XLA)."""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of a forbidden place: finite, so that a row of padding gives no NaN."""
QUERY_BLOCK = 256
"""Queries whose scores exist at one time."""
LOCAL_BLOCK = 32
"""Queries that look at the same keys where segments are short: smaller blocks see fewer keys that no segment shares."""


def attend_rows(
    query_RxTxHxh: jax.Array,
    key_RxTxKxh: jax.Array,
    value_RxTxKxh: jax.Array,
    segments_RxL: jax.Array,
    branch_end_RxP: jax.Array | None = None,
    longest_segment: int = 0,
) -> jax.Array:
    """Attention of whole rows, [R, T, H, h]: the trunk, and the branches of k tokens behind it where T is L + P·k.

    A branch token attends to the places of one trunk segment up to its `branch_end`, and to its own branch's earlier
    tokens and itself. Nothing else attends to a branch.
    """
    length = segments_RxL.shape[1]
    query, key, value = (array[:, :length] for array in (query_RxTxHxh, key_RxTxKxh, value_RxTxKxh))
    trunk = attend(query, key, value, segments_RxL, longest_segment)
    size = query_RxTxHxh.shape[1] - length
    if not size:
        return trunk
    allowed = _branch_mask(segments_RxL, branch_end_RxP, size)
    branches = attend_masked(query_RxTxHxh[:, length:], key_RxTxKxh, value_RxTxKxh, allowed)
    return jnp.concatenate([trunk, branches], axis=1)


def _branch_mask(segments_RxL: jax.Array, branch_end_RxP: jax.Array, size: int) -> jax.Array:
    """bool [R, B, L + B]: what the B = P·k branch tokens of a row attend to."""
    rows, length = segments_RxL.shape
    k = size // branch_end_RxP.shape[1]
    parent_RxP = jnp.take_along_axis(segments_RxL, branch_end_RxP, axis=1)
    in_segment_RxPxL = segments_RxL[:, None, :] == parent_RxP[:, :, None]
    prefix_RxPxL = in_segment_RxPxL & (jnp.arange(length) <= branch_end_RxP[:, :, None])
    slots_B = jnp.arange(size)
    own_BxB = (slots_B[:, None] // k == slots_B // k) & (slots_B[:, None] >= slots_B)
    return jnp.concatenate([jnp.repeat(prefix_RxPxL, k, axis=1), jnp.broadcast_to(own_BxB, (rows, size, size))], axis=2)


def attend(
    query_RxLxHxh: jax.Array,
    key_RxLxKxh: jax.Array,
    value_RxLxKxh: jax.Array,
    segments_RxL: jax.Array,
    longest_segment: int = 0,
) -> jax.Array:
    """Each query attends to earlier keys (and its own) of its own segment; [R, L, H, h].

    Scores never take L² memory. Where segments are known to be short against the row, queries are taken in blocks of
    that size against their own block and the one before; otherwise in longer blocks, each against the keys up to its
    own end, with scores computed again in the backward pass. Padding (segment 0) attends to padding: its outputs are
    finite, and nothing else reads them.
    """
    length = query_RxLxHxh.shape[1]
    arrays = (query_RxLxHxh, key_RxLxKxh, value_RxLxKxh, segments_RxL)
    back = -(-(longest_segment - 1) // LOCAL_BLOCK)
    if longest_segment and (back + 1) * LOCAL_BLOCK < length:
        return _attend_locally(*arrays, max(back, 1))
    if length <= QUERY_BLOCK:
        return _causal_block(*arrays, segments_RxL, start=0)
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        query, key, value, segments = (array[:, :end] for array in arrays)
        attend_block = jax.checkpoint(functools.partial(_causal_block, start=start))
        outputs.append(attend_block(query[:, start:], key, value, segments, segments[:, start:]))
    return jnp.concatenate(outputs, axis=1)


def _attend_locally(
    query_RxLxHxh: jax.Array, key_RxLxKxh: jax.Array, value_RxLxKxh: jax.Array, segments_RxL: jax.Array, back: int
) -> jax.Array:
    """Attention where no segment reaches further than `back` blocks: each block of queries sees those and its own."""
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
    )
    return mixed.reshape(rows, num_blocks * block, *mixed.shape[2:])[:, :length]


def _causal_block(
    query_RxQxHxh: jax.Array,
    key_RxSxKxh: jax.Array,
    value_RxSxKxh: jax.Array,
    segments_RxS: jax.Array,
    segments_RxQ: jax.Array,
    start: int,
) -> jax.Array:
    places_Q = start + jnp.arange(query_RxQxHxh.shape[1])
    causal_QxS = places_Q[:, None] >= jnp.arange(key_RxSxKxh.shape[1])
    allowed_RxQxS = causal_QxS & (segments_RxQ[:, :, None] == segments_RxS[:, None, :])
    return attend_masked(query_RxQxHxh, key_RxSxKxh, value_RxSxKxh, allowed_RxQxS)


def attend_masked(
    query_RxQxHxh: jax.Array, key_RxSxKxh: jax.Array, value_RxSxKxh: jax.Array, allowed_RxQxS: jax.Array
) -> jax.Array:
    """Attention over the allowed places, softmax in float32; every query has at least one. [R, Q, H, h].

    Query heads share keys in consecutive groups (GQA); keys and values are not repeated in memory.
    """
    rows, queries, heads, width = query_RxQxHxh.shape
    kv_heads = key_RxSxKxh.shape[2]
    grouped = query_RxQxHxh.reshape(rows, queries, kv_heads, heads // kv_heads, width) * width**-0.5
    scores = jnp.einsum("rqkgh,rskh->rkgqs", grouped, key_RxSxKxh, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed_RxQxS[:, None, None], scores, MASKED)
    shares = jax.nn.softmax(scores, axis=-1).astype(value_RxSxKxh.dtype)
    mixed = jnp.einsum("rkgqs,rskh->rqkgh", shares, value_RxSxKxh)
    return mixed.reshape(rows, queries, heads, width)
