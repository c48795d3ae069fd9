# SPDX-License-Identifier: Apache-2.0
"""Attention of packed rows by JAX's splash kernel for TPUs: scores stay on the chip, and far blocks are skipped."""

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from llm_jepa_jax.models.ops import ATTENTION

LANES = 128
"""Row lengths and blocks are multiples of this."""
LARGEST_BLOCK = 512


def attend(
    query_RxQxHxh: jax.Array,
    key_RxSxKxh: jax.Array,
    value_RxSxKxh: jax.Array,
    segments_RxS: jax.Array,
    longest_segment: int = 0,
    window: int = 0,
    soft_cap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """As `xla.attend`, on one device: Q is a multiple of 128, S one of Q, h is 64, 128 or 256.

    The kernel skips blocks by its static mask alone, so a promise of short segments goes into it as a window.
    `interpret` runs it on a CPU.
    """
    (num_queries, heads, width), length = query_RxQxHxh.shape[1:], segments_RxS.shape[1]
    reach = min(longest_segment or length, window or length)
    kernel = _kernel(num_queries, length, heads, reach, window, soft_cap, interpret)
    # The kernel puts heads before places, and leaves the scale to its caller; keys have the fewer heads.
    query_RxHxQxh, value_RxKxSxh = query_RxQxHxh.swapaxes(1, 2), value_RxSxKxh.swapaxes(1, 2)
    key_RxKxSxh = (key_RxSxKxh * width**-0.5).swapaxes(1, 2)
    segment_ids = splash.SegmentIds(segments_RxS[:, length - num_queries :], segments_RxS)
    return jax.vmap(kernel)(query_RxHxQxh, key_RxKxSxh, value_RxKxSxh, segment_ids).swapaxes(1, 2)


def _kernel(
    num_queries: int, length: int, heads: int, reach: int, window: int, soft_cap: float, interpret: bool
) -> splash.SplashAttentionKernel:
    """The kernel of one row on one device; it shares keys between query heads in consecutive groups by itself."""
    shape, before = (num_queries, length), length - num_queries
    if reach == length:
        mask = masks.CausalMask(shape, before)
    elif reach == window:
        mask = masks.LocalMask(shape, (reach - 1, 0), before)
    else:
        mask = _NearMask(shape, (reach - 1, 0), before)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=block_sizes(num_queries, reach, length),
        attn_logits_soft_cap=soft_cap or None,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


class _NearMask(masks.LocalMask):
    """A window that skips blocks and hides nothing inside those that are visited: segments end within it anyway.

    A comparison less for every pair of places, of which the kernel's time is made: the forward pass takes 0.85 of the
    instructions (v6e, libtpu 0.0.42).
    """

    def __init__(self, shape: tuple[int, int], window_size: tuple[int, int], offset: int):
        super().__init__(shape, window_size, offset)
        self._within = self.mask_function
        self.mask_function = masks.CausalMask(shape, offset).mask_function

    def __getitem__(self, places: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (np.arange(size)[part] for part, size in zip(places, self.shape, strict=True))
        return self._within(queries[:, None], keys[None, :])


def block_sizes(num_queries: int, reach: int, length: int = 0) -> splash.BlockSizes:
    """Square blocks, the largest power of two times 128 that divides the queries and is not much longer than the reach.

    `length` is how many keys there are, if more than queries.

    A short reach wants short blocks: a block of queries visits every block of keys it touches as a whole. The fused
    backward kernel writes one partial gradient of the queries for each block of keys, so it is for rows of one block.
    """
    block = LANES
    while num_queries % (2 * block) == 0 and 2 * block <= min(LARGEST_BLOCK, max(reach, LANES)):
        block *= 2
    if block == (length or num_queries):
        return splash.BlockSizes(block, block, block, block, block, block, use_fused_bwd_kernel=True)
    return splash.BlockSizes(block, block, block, block, block, block, block, block)
