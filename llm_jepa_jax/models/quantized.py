# SPDX-License-Identifier: Apache-2.0
"""Weights that are only read, in 8 or 4 bits: codes, and a scale for each tile of a weight's inputs.

`int8` codes are multiples of their scale; `nf4` codes are places in a table of 16 quantiles of the normal distribution
(QLoRA, arXiv 2305.14314, appendix E). Codes are made by `qwix`, which is imported only then. They are read back here:
`qwix.dequantize` looks each 4-bit code up in float32 and lays it down, which compiled for TPU v5p takes 11 times the
temporary memory and 5 times the estimated time of the selections below (a 1,024-wide layer, 512 tokens).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jepa_jax.errors import UserError

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SCALE_DTYPE = jnp.bfloat16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight of some shape. Trees of its logical axes and shardings have one of these too, of equal entries."""

    codes: Any
    """int8, of the weight's shape; or uint8, two nf4 codes a byte, half as long along the tiled axis: the low half of a
    byte belongs to the first half of a tile."""
    scale: Any
    """bfloat16: the weight's shape, with each tile of one axis reduced to one entry."""


Weight = jax.Array | Quantized


def quantize(array: jax.Array, kind: str, axis: int, tile: int) -> Quantized:
    """`array` as `int8` or `nf4`, with a scale for every `tile` entries along `axis`.

    Raises:
        UserError: `qwix` is not installed.
    """
    try:
        import qwix  # optional: only quantised weights need it
    except ImportError as error:
        raise UserError(
            f"config: `lora.base_dtype`={kind} needs qwix; `pip install 'llm_jepa_jax[lora]'`, or use bfloat16"
        ) from error
    each = [other for other in range(array.ndim) if other != axis]
    made = qwix.quantize(
        array.astype(jnp.float32), kind if kind == "nf4" else jnp.int8, channelwise_axes=each, tiled_axes={axis: tile},
        scale_dtype=SCALE_DTYPE,
    )  # fmt: skip
    return Quantized(_packed(made.qvalue, axis, tile) if kind == "nf4" else made.qvalue, made.scale)


def _packed(codes: jax.Array, axis: int, tile: int) -> jax.Array:
    """Two 4-bit codes a byte. JAX has arrays of uint4, but its compiled functions refuse them as arguments (0.10.2)."""
    before, size, behind = codes.shape[:axis], codes.shape[axis], codes.shape[axis + 1 :]
    halves = codes.astype(jnp.uint8).reshape(*before, size // tile, 2, tile // 2, *behind)
    low, high = (jax.lax.index_in_dim(halves, half, axis + 1, keepdims=False) for half in (0, 1))
    return (low | high << 4).reshape(*before, size // 2, *behind)


def whole(weight: Weight, dtype: Any) -> jax.Array:
    """A weight as an array of this type: products of codes and scales, rounded once."""
    if not isinstance(weight, Quantized):
        return weight.astype(dtype)
    codes, scale = weight.codes, weight.scale
    axis = next((i for i, sizes in enumerate(zip(codes.shape, scale.shape, strict=True)) if len(set(sizes)) > 1), 0)
    before, tiles, behind = scale.shape[:axis], scale.shape[axis], scale.shape[axis + 1 :]
    split = codes.reshape(*before, tiles, codes.shape[axis] // tiles, *behind)
    if codes.dtype == jnp.uint8:
        split = split.astype(jnp.int32)
        values = _nf4(jnp.concatenate([split & 15, split >> 4], axis=axis + 1))
    else:
        values = split.astype(dtype)  # exact in bfloat16 too
    product = values * jnp.expand_dims(scale, axis + 1).astype(values.dtype)
    return product.reshape(*before, tiles * values.shape[axis + 1], *behind).astype(dtype)


def _nf4(codes: jax.Array) -> jax.Array:
    """The table's entries, chosen by one bit of the codes after the other."""
    chosen = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        chosen = [jnp.where(is_set, high, low) for low, high in zip(chosen[::2], chosen[1::2], strict=True)]
    return chosen[0]
