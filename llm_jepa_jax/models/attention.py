# SPDX-License-Identifier: Apache-2.0
"""Causal attention within segments, on every platform (XLA)."""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of a forbidden place: finite, so that a row of padding gives no NaN."""
QUERY_BLOCK = 256
"""Queries whose scores exist at one time."""


def attend(
    query_RxLxHxh: jax.Array, key_RxLxKxh: jax.Array, value_RxLxKxh: jax.Array, segments_RxL: jax.Array
) -> jax.Array:
    """Each query attends to earlier keys (and its own) of its own segment; [R, L, H, h].

    Queries are taken in blocks, each against the keys up to its own end, so that scores never take L² memory and
    the upper triangle is not computed; a block's scores are computed again in the backward pass. Padding (segment 0)
    attends to padding: its outputs are finite, and nothing else reads them.
    """
    length = query_RxLxHxh.shape[1]
    if length <= QUERY_BLOCK:
        return _causal_block(query_RxLxHxh, key_RxLxKxh, value_RxLxKxh, segments_RxL, segments_RxL, start=0)
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        block = jax.checkpoint(functools.partial(_causal_block, start=start))
        outputs.append(
            block(
                query_RxLxHxh[:, start:end],
                key_RxLxKxh[:, :end],
                value_RxLxKxh[:, :end],
                segments_RxL[:, start:end],
                segments_RxL[:, :end],
            )
        )
    return jnp.concatenate(outputs, axis=1)


def _causal_block(
    query_RxQxHxh: jax.Array,
    key_RxSxKxh: jax.Array,
    value_RxSxKxh: jax.Array,
    segments_RxQ: jax.Array,
    segments_RxS: jax.Array,
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
