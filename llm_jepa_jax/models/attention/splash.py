# SPDX-License-Identifier: Apache-2.0
"""Attention of packed rows by JAX's splash kernel for TPUs: scores stay on the chip, and far blocks are skipped."""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from llm_jepa_jax.models.ops import ATTENTION

LANES = 128
"""Row lengths and blocks are multiples of this."""
LARGEST_BLOCK = 512


def attend(
    query_RxLxHxh: jax.Array,
    key_RxLxKxh: jax.Array,
    value_RxLxKxh: jax.Array,
    segments_RxL: jax.Array,
    longest_segment: int = 0,
    window: int = 0,
    soft_cap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """As `xla.attend`, on one device: L is a multiple of 128, h is 64, 128 or 256.

    The kernel skips blocks by its static mask alone, so a promise of short segments goes into it as a window.
    `interpret` runs it on a CPU.
    """
    length, heads, width = query_RxLxHxh.shape[1:]
    kernel = _kernel(length, heads, min(longest_segment or length, window or length), soft_cap, interpret)
    # The kernel puts heads before places, and leaves the scale to its caller.
    query_RxHxLxh = (query_RxLxHxh * width**-0.5).swapaxes(1, 2)
    key_RxKxLxh, value_RxKxLxh = key_RxLxKxh.swapaxes(1, 2), value_RxLxKxh.swapaxes(1, 2)
    segment_ids = splash.SegmentIds(segments_RxL, segments_RxL)
    return jax.vmap(kernel)(query_RxHxLxh, key_RxKxLxh, value_RxKxLxh, segment_ids).swapaxes(1, 2)


def _kernel(length: int, heads: int, reach: int, soft_cap: float, interpret: bool) -> splash.SplashAttentionKernel:
    """The kernel of one row on one device; it shares keys between query heads in consecutive groups by itself."""
    square = (length, length)
    mask = masks.LocalMask(square, (reach - 1, 0), 0) if reach < length else masks.CausalMask(square)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=block_sizes(length, reach),
        attn_logits_soft_cap=soft_cap or None,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


def block_sizes(length: int, reach: int) -> splash.BlockSizes:
    """Square blocks, the largest power of two times 128 that divides the row and is not much longer than the reach.

    A short reach wants short blocks: a block of queries visits every block of keys it touches as a whole. The fused
    backward kernel writes one partial gradient of the queries for each block of keys, so it is for rows of one block.
    """
    block = LANES
    while length % (2 * block) == 0 and 2 * block <= min(LARGEST_BLOCK, max(reach, LANES)):
        block *= 2
    if block == length:
        return splash.BlockSizes(block, block, block, block, block, block, use_fused_bwd_kernel=True)
    return splash.BlockSizes(block, block, block, block, block, block, block, block)
