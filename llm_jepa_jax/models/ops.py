# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a decoder as pure functions."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llm_jepa_jax.config import ModelConfig, RopeScalingConfig
from llm_jepa_jax.models.quantized import Weight, whole
from llm_jepa_jax.models.symbolic import filled, known


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the axes of `scale`, the last of `x` (Zhang & Sennrich, 2019).

    float32 inside, the type of `x` outside.
    """
    wide, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm over the axes of `scale`, the last of `x` (Ba et al., 2016); types as in `rms_norm`."""
    wide, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    centred = wide - jnp.mean(wide, axis=axes, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=axes, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def fenced(x: jax.Array) -> jax.Array:
    """`x`, which the compiler makes before it goes on, and its gradient likewise: what is in front is not fused with
    what is behind.

    TPU compilers put a norm into each product that reads it, and its backward pass, with its sums over tokens and over
    the width, into the product in front of it; their blocks then become small. Compiled for v6e (libtpu 0.0.42), gate
    and up took 1.1 and 1.5 times the cycles of products of a norm that was there, their gradients by weights 1.1 times;
    products in front of a backward pass took 1.7 times theirs (v5p and v6e). The norm alone is much less.
    """
    return jax.lax.optimization_barrier(x)


fenced.defvjp(lambda x: (fenced(x), None), lambda _, grad: (jax.lax.optimization_barrier(grad),))


@jax.custom_vjp
def with_fenced_gradients(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The arrays, whose gradients the compiler makes all at once before it goes on.

    For a gate and what it opens, TPU compilers do that behind the product which gives the gradient of the hidden layer,
    at 1.1 times its cycles; left alone they compute one of the gradients anew in each product that reads it, at 1.1 to
    1.3 times theirs (v6e, libtpu 0.0.42).
    """
    return arrays


with_fenced_gradients.defvjp(lambda arrays: (arrays, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


def rotary_frequencies(config: ModelConfig, local: bool = False) -> np.ndarray:
    """float32 [r / 2] radians a position, r the rotated part of a head, scaled where that is on.

    `linear` divides all frequencies by `factor` (Chen et al., 2023). `llama3` (The Llama 3 Herd, section 3.2) divides
    those of long wavelengths, keeps those of short ones, and blends between them linearly in frequency. `yarn` (Peng et
    al., 2023) does so linearly in the frequency's place. `local` gives those of windowed layers, which have their own
    base, unscaled, where the model has two.
    """
    width = rotary_width(config)
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    if local and config.local_rope_theta:
        return (config.local_rope_theta**-exponents).astype(np.float32)
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling.factor != 1.0 and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.factor != 1.0 and scaling.kind == "yarn":
        kept = _kept_by_yarn(scaling, config.rope_theta, width)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
    elif scaling.factor != 1.0:
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def _kept_by_yarn(scaling: RopeScalingConfig, theta: float, width: int) -> np.ndarray:
    """float64 [r / 2] from 1 (the frequency stays) to 0 (it is divided by the factor), r the rotated width."""

    def place(turns: float) -> float:
        # Of the frequency that turns so often within the original context.
        return width * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return 1.0 - np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0.0, 1.0)


def rotary_scale(scaling: RopeScalingConfig) -> float:
    """What rotated queries and keys are multiplied by: YaRN's temperature of attention."""
    if scaling.kind != "yarn" or scaling.factor == 1.0:
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def rotary_width(config: ModelConfig) -> int:
    """How many places of a head are rotated."""
    return int(config.head_dim * config.rope_share)


Tables = tuple[jax.Array, jax.Array]
"""cos and sin of each position's angles, times YaRN's factor, float32 [R, L, r / 2] each."""


def rotary_tables(config: ModelConfig, positions_RxL: jax.Array) -> tuple[Tables, Tables | None]:
    """The tables of all layers; or of global layers, and of windowed ones where those have their own base."""
    wide_RxLx1 = positions_RxL[..., None].astype(jnp.float32)

    def tables(local: bool) -> Tables:
        angles = wide_RxLx1 * rotary_frequencies(config, local)
        scale = 1.0 if local else rotary_scale(config.rope_scaling)
        return (
            (jnp.cos(angles), jnp.sin(angles)) if scale == 1.0 else (jnp.cos(angles) * scale, jnp.sin(angles) * scale)
        )

    return tables(False), tables(True) if config.local_rope_theta else None


def apply_rotary(x_RxLxHxh: jax.Array, tables: Tables, by_product: bool = False) -> jax.Array:
    """Rotates the pairs (i, i + r/2) of each head's first r places: the half-split convention of published models.

    There is no gradient by the tables. `by_product` is the same by a matrix product, which is faster on TPUs.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    width = 2 * cos.shape[-1]
    rotated = _rotate(x_RxLxHxh[..., :width], cos, sin, by_product)
    if width == x_RxLxHxh.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x_RxLxHxh[..., width:]], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, by_product: bool) -> jax.Array:
    """float32 inside, the type of `x` outside. Its derivative is the rotation back."""
    return (_rotate_by_product if by_product else _rotate_by_halves)(x, cos, sin)


_rotate.defvjp(
    lambda x, cos, sin, by_product: (_rotate(x, cos, sin, by_product), (cos, sin)),
    lambda by_product, tables, grad: (_rotate(grad, tables[0], -tables[1], by_product), None, None),
)


def _rotate_by_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rotate_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The halves change places in a product with a matrix of zeros and ones, which is exact.

    Half a head fills half the lanes of a TPU's vectors, and does not fuse with what is around it: queries, forward
    and backward with their projection, took 1.5 times as long (compiled for v6e).
    """
    width = x.shape[-1]
    swap = jnp.roll(jnp.eye(width, dtype=x.dtype), width // 2, axis=0)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    turned = jnp.einsum("rlhd,de->rlhe", x, swap, precision=precision).astype(jnp.float32)
    cos, signed_sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * signed_sin).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap · tanh(x / cap); `x` itself where the cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


AGAIN = "again"
"""Name for remat of what every policy makes again."""
PRODUCT = "product"
"""Name of a linear layer's output, by which remat policies find it: they do not look inside a `custom_vjp`."""


ATTENTION = "attention"
"""Name of what an attention kernel's backward pass wants again: its result and the logarithms of its denominators."""


HIDDEN = "hidden"
"""Name of the products that make the MLP's hidden layer: the widest of a block, and cheap to compute again."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank addition to a linear layer (LoRA, arXiv 2106.09685), in the compute type."""

    x: jax.Array
    """What it reads: the layer's input, or that after dropout, [R, L, *In]."""
    a: jax.Array
    """[*In, r]"""
    b: jax.Array
    """[r, *Out]"""
    scale: jax.Array
    """Scalar."""


def adapter_names(name: str) -> tuple[str, str, str]:
    """What A, B and the scale of a weight's adapter are called."""
    return f"{name}_lora_a", f"{name}_lora_b", f"{name}_lora_scale"


def linear(x: jax.Array, weight: Weight, adapter: Adapter | None = None, name: str = PRODUCT) -> jax.Array:
    """`x [..., *In] @ weight [*In, *Out]` over all axes of In that `x` ends with, named for remat; [..., *Out].

    With an adapter, scale · x A B is added; W + A B never exists. A weight that nobody differentiates by costs no
    gradient, and nothing is kept for one: not `x`, and of a quantised weight only what it is stored as.
    """
    out = _linear(x, weight)
    if adapter is not None:
        inner = checkpoint_name(_linear(adapter.x, adapter.a), PRODUCT)
        out = out + _linear(inner, adapter.b) * adapter.scale
    return checkpoint_name(out, name)


@jax.custom_vjp
def _linear(x: jax.Array, weight: Weight) -> jax.Array:
    """The number of contracted axes is `x.ndim - 2`: inputs are [R, L, *In]. The derivative by the weight is written as
    one product of two matrices, tokens first. Differentiating an einsum leaves it to XLA:CPU to transpose the larger
    operand, fused with whatever made it: a SwiGLU block forward and backward took 1.7 times as long.
    """
    return jnp.tensordot(x, whole(weight, x.dtype), axes=x.ndim - 2)


def _linear_forward(x: Any, weight: Any) -> tuple[jax.Array, tuple[jax.Array | None, Weight]]:
    (x, _), (weight, is_trained) = known(x), known(weight)
    return _linear(x, weight), (x if is_trained else None, weight)


def _linear_backward(saved: tuple[jax.Array | None, Weight], grad: Any) -> tuple[jax.Array, Any]:
    x, stored = saved
    grad = filled(grad)
    weight = whole(stored, grad.dtype)
    num_out = grad.ndim - 2
    num_in = weight.ndim - num_out
    by_x = jnp.tensordot(grad, weight, axes=(tuple(range(2, grad.ndim)), tuple(range(num_in, weight.ndim))))
    if x is None:
        return by_x, None
    tokens = (((0, 1), (0, 1)), ((), ()))
    if x.size <= grad.size:
        return by_x, jax.lax.dot_general(x, grad, tokens)
    turned = jax.lax.dot_general(grad, x, tokens)
    return by_x, turned.transpose(*range(num_out, turned.ndim), *range(num_out))


_linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)
