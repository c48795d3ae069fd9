# SPDX-License-Identifier: Apache-2.0
"""Attention over any set of places, all scores at once: for few queries (branches, decoding) and short rows."""

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of a forbidden place: finite, so that a row of padding gives no NaN."""


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
