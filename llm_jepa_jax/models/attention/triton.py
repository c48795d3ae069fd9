# SPDX-License-Identifier: Apache-2.0
"""Attention of packed rows by JAX's Pallas kernel for GPUs, which Triton compiles."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import mha


def attend(
    query_RxLxHxh: jax.Array,
    key_RxLxKxh: jax.Array,
    value_RxLxKxh: jax.Array,
    segments_RxL: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """As `xla.attend` without window and soft cap, on one device: L is a multiple of 128.

    The kernel wants a key head for every query head, so keys and values are repeated. `interpret` runs it on a CPU.
    """
    heads, width = query_RxLxHxh.shape[2:]
    key_RxLxHxh, value_RxLxHxh = (
        jnp.repeat(array, heads // array.shape[2], axis=2) for array in (key_RxLxKxh, value_RxLxKxh)
    )
    return mha(
        query_RxLxHxh, key_RxLxHxh, value_RxLxHxh, segments_RxL, sm_scale=width**-0.5, causal=True, interpret=interpret
    )
