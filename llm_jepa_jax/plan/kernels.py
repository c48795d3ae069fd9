# SPDX-License-Identifier: Apache-2.0
"""Attention kernels, of which a compiler knows nothing: their products from the blocks that they visit."""

import dataclasses
import math
import re

from llm_jepa_jax.plan.chips import Chip
from llm_jepa_jax.plan.hlo import Computation, Instruction

PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}
"""Matrix products of a pair of blocks, by pass: scores and values; the backward passes compute the scores again."""
BLOCK_SIZE = re.compile(r'block_q\\*": (\d+)')
IS_KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of the attention kernel."""

    part: str
    """A key of `PRODUCTS`."""
    flops: float
    """Of all blocks visited, masked places included."""

    def seconds(self, chip: Chip) -> float:
        """At the share of the peak that `chips.Attention` assumes."""
        share = chip.attention.forward if self.part == "fwd" else chip.attention.backward
        return self.flops / (chip.peak * share) if chip.peak else 0.0


def visited(length: int, reach: int, block: int, before: int = 0) -> int:
    """Pairs of places in the blocks that causal attention over `reach` tokens visits in a row of `length`, or in a part
    of one that has so many places before it.
    """
    total = 0
    for query in range(before, before + length, block):
        first = max(0, (query - (reach - 1)) // block * block)
        total += (query + block - first) * block
    return total


def attention_kernel(computation: Computation, instruction: Instruction, reach: int) -> Kernel | None:
    """The kernel call that an instruction is; None for others. `reach`: the longest segment, or window if shorter."""
    if IS_KERNEL not in instruction.rest or "splash" not in instruction.name:
        return None
    operands = [computation.by_name[name].arrays[0] for name in instruction.operands if name in computation.by_name]
    query = next(array for array in operands if array.kind in ("bf16", "f32") and len(array.sizes) >= 3)
    *batch, heads, length, width = query.sizes
    rows = math.prod(batch)
    block = BLOCK_SIZE.search(instruction.rest)
    keys = max(array.sizes[-2] for array in operands if len(array.sizes) >= 3 and array.sizes[-1] == width)
    size = int(block.group(1)) if block else 512
    pairs = rows * heads * visited(length, min(reach or keys, keys), size, keys - length)
    part = next((name for name in ("fwd", "dq", "dkv") if name in instruction.name), "fwd")
    if part == "dkv" and 'use_fused_bwd_kernel\\": true' in instruction.rest:
        part = "fused"
    return Kernel(part, 2.0 * PRODUCTS[part] * width * pairs)
