# SPDX-License-Identifier: Apache-2.0
"""HBM of one device by kind: the state by its leaves, the rest by what the compiled program holds."""

import dataclasses
import math
from typing import Any

import jax

from llm_jepa_jax.plan.hlo import Instruction, Module


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. They add up to `peak`."""

    parameters: float
    frozen: float
    """Parameters that are not trained."""
    optimizer: float
    batch: float
    activations: float
    """What the forward pass keeps for the backward pass."""
    gradients: float
    temporaries: float
    """Gathered weights, logits, and whatever else lives for a while."""
    available: float
    """What the device has; 0: not known."""

    @property
    def peak(self) -> float:
        """The most that is held at one time."""
        kinds = (self.parameters, self.frozen, self.optimizer, self.batch)
        return sum(kinds) + self.activations + self.gradients + self.temporaries

    @property
    def fits(self) -> bool:
        return not self.available or self.peak <= self.available


def leaf_bytes(leaf: Any) -> float:
    """Bytes of an abstract leaf on one device under its sharding."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    return float(math.prod(shape) * leaf.dtype.itemsize)


def tree_bytes(tree: Any) -> float:
    """Of all leaves on one device."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def state_bytes(state: Any) -> dict[str, float]:
    """Bytes of a training state on one device by kind, by the names of its fields: whatever it holds is counted."""
    found = {"parameters": 0.0, "frozen": 0.0, "optimizer": 0.0}
    kinds = {"params": "parameters", "frozen": "frozen"}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        field = getattr(path[0], "name", str(path[0]))
        found[kinds.get(field, "optimizer")] += leaf_bytes(leaf)
    return found


def compiled_memory(compiled: Any, module: Module, state: Any, batch: Any, available: float) -> Memory:
    """The memory of a compiled step.

    Arguments are the state and the batch; the new state takes the place of the old one. Of the temporaries, what loops
    over layers stack up is told apart: what the backward pass needs from the forward pass, and gradients.
    """
    kinds, rows = state_bytes(state), tree_bytes(batch)
    analysis = compiled.memory_analysis()
    aliased = analysis.alias_size_in_bytes
    outputs = max(0, analysis.output_size_in_bytes - aliased)
    total = analysis.argument_size_in_bytes + outputs + analysis.temp_size_in_bytes
    peak = getattr(analysis, "peak_memory_in_bytes", 0) or total
    held = max(total if total <= peak else peak, sum(kinds.values()) + rows)
    rest = held - sum(kinds.values()) - rows
    activations = min(rest, stacked_bytes(module, backward=False))
    gradients = min(rest - activations, stacked_bytes(module, backward=True))
    return Memory(**kinds, batch=rows, activations=activations, gradients=gradients,
                  temporaries=rest - activations - gradients, available=available)  # fmt: skip


def stacked_bytes(module: Module, backward: bool) -> float:
    """Bytes of the arrays that loops of the forward (or backward) pass write one slice of each turn."""
    total = 0.0
    for computation in module.computations.values():
        for loop in computation.instructions:
            is_backward = "transpose(" in loop.op_name
            if loop.opcode == "while" and is_backward == backward and "jvp(" in loop.op_name:
                total += _written(module, loop)
    return total


def _written(module: Module, loop: Instruction) -> float:
    trips = module.trips(loop)
    body = module.computations[loop.called["body"]]
    if body.root.opcode != "tuple" or not trips:
        return 0.0
    total = 0.0
    for name in body.root.operands:
        element = body.by_name[name]
        while element.opcode in ("bitcast", "copy-done", "copy-start", "copy") and element.operands:
            element = body.by_name[element.operands[0]]
        if element.opcode == "get-tuple-element":
            element = body.by_name[element.operands[0]]
        writes = element.opcode == "dynamic-update-slice" or (
            element.opcode == "fusion"
            and any(
                i.opcode == "dynamic-update-slice" for i in module.computations[element.called["calls"]].instructions
            )
        )
        array = body.by_name[name].arrays[0]
        if writes and array.sizes and array.sizes[0] == trips:
            total += array.num_bytes
    return total
