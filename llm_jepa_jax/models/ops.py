# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a decoder as pure functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llm_jepa_jax.config import ModelConfig


def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang & Sennrich, 2019); float32 inside, the type of `x` outside."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (normed * scale_D.astype(jnp.float32)).astype(x.dtype)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """float32 [h / 2] radians a position, with Llama 3.1's scaling (The Llama 3 Herd, section 3.2) where it is on.

    Long wavelengths are divided by `factor`, short ones are kept, and those between are blended linearly in frequency.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling.factor != 1.0:
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotary_tables(config: ModelConfig, positions_RxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position's angles, float32 [R, L, h / 2]."""
    angles = positions_RxL[..., None].astype(jnp.float32) * rotary_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x_RxLxHxh: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + h/2) of each head: the half-split convention of published Llama checkpoints."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x_RxLxHxh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_RxLxHxh.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SiLU(gate) * up (Shazeer, 2020)."""
    return jax.nn.silu(gate) * up


PRODUCT = "product"
"""Name of every linear layer's output, by which remat policies find it: they do not look inside a `custom_vjp`."""


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [..., *In] @ weight [*In, *Out]` over all axes of In that `x` ends with, named `PRODUCT`; [..., *Out]."""
    return checkpoint_name(_linear(x, weight), PRODUCT)


@jax.custom_vjp
def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The number of contracted axes is `x.ndim - 2`: inputs are [R, L, *In]. The derivative by the weight is written as
    one product of two matrices, tokens first. Differentiating an einsum leaves it to XLA:CPU to transpose the larger
    operand, fused with whatever made it: a SwiGLU block forward and backward took 1.7 times as long.
    """
    return jnp.tensordot(x, weight, axes=x.ndim - 2)


def _linear_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _linear(x, weight), (x, weight)


def _linear_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    num_in = x.ndim - 2
    outs = tuple(range(num_in, weight.ndim))
    by_x = jnp.tensordot(grad, weight, axes=(tuple(range(2, grad.ndim)), outs))
    tokens = (((0, 1), (0, 1)), ((), ()))
    if x.size <= grad.size:
        return by_x, jax.lax.dot_general(x, grad, tokens)
    turned = jax.lax.dot_general(grad, x, tokens)
    num_out = grad.ndim - 2
    return by_x, turned.transpose(*range(num_out, turned.ndim), *range(num_out))


_linear.defvjp(_linear_forward, _linear_backward)
