# SPDX-License-Identifier: Apache-2.0
"""Layers whose gradients are added to running sums while the backward pass goes through them.

Micro-batches as a rule hold two copies of all gradients: the sums so far, and those of the part in hand. Here the
backward loop carries the sums and adds each layer's gradient in place, so the second copy is one layer's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Block = Callable[[Any, Any, Any], Any]
"""(one layer's parameters, carry, context) to the carry behind the layer: arrays of the same shapes."""
Blocks = Block | tuple[Block, ...]
"""One for all layers, whose parameters are stacked ([N, ...] each); or one for each, whose parameters lie in a
dictionary at its number (`"0"`, `"1"`, …)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_adding(blocks: Blocks, unrolled: bool, layers: Any, sums: Any, carry: Any, context: Any) -> Any:
    """The carry behind N layers, whose parameters are `layers`: stacked, or each by itself; the latter are unrolled.

    The gradient by `sums` (a tree like `layers`) *is* the new sums: `sums` and the gradient by `layers` added up, in
    the type of `sums`. There is no gradient by `layers` itself, nor by `context`. What a layer keeps for the backward
    pass is up to its block (`jax.checkpoint`); parameters and context are not kept again for each layer. `unrolled`
    layers are compiled one after the other instead of as a loop.
    """
    return _forward(blocks, unrolled, layers, sums, carry, context)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pull:
    """A layer's backward function, without the arrays that are at hand anyway."""

    kept: list[Any]
    structure: Any = dataclasses.field(metadata={"static": True})
    known: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Of each leaf, its place among the arrays at hand; -1: it is kept."""


def _without(pull: Any, at_hand: list[Any]) -> _Pull:
    leaves, structure = jax.tree.flatten(pull)
    places = {id(array): place for place, array in enumerate(at_hand)}
    known = tuple(places.get(id(leaf), -1) for leaf in leaves)
    return _Pull([leaf for leaf, place in zip(leaves, known, strict=True) if place < 0], structure, known)


def _with(pull: _Pull, at_hand: list[Any]) -> Any:
    kept = iter(pull.kept)
    return jax.tree.unflatten(pull.structure, [at_hand[p] if p >= 0 else next(kept) for p in pull.known])


def _forward(blocks: Blocks, unrolled: bool, layers: Any, sums: Any, carry: Any, context: Any) -> tuple[Any, Any]:
    def run(carry: Any, layer: Any, block: Any = blocks) -> tuple[Any, _Pull]:
        # The context is an argument too: what a function closes over does not come back as itself.
        carry, pull = jax.vjp(block, layer, carry, context)
        return carry, _without(pull, jax.tree.leaves((layer, context)))

    if not unrolled:
        carry, pulls = jax.lax.scan(run, carry, layers)
        return carry, (layers, sums, pulls, context)
    pulls = []
    each = blocks if isinstance(blocks, tuple) else (blocks,) * _depth(layers)
    for number, block in enumerate(each):
        layer = layers[str(number)] if isinstance(blocks, tuple) else _layer(layers, number)
        carry, pull = run(carry, layer, block)
        pulls.append(pull)
    return carry, (layers, sums, pulls, context)


def _backward(blocks: Blocks, unrolled: bool, saved: Any, grad: Any) -> tuple[Any, ...]:
    layers, sums, pulls, context = saved
    if isinstance(blocks, tuple):
        for number in reversed(range(len(blocks))):
            name = str(number)
            by_layer, grad, _ = _with(pulls[number], jax.tree.leaves((layers[name], context)))(grad)
            added = jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums[name], by_layer)
            sums = sums | {name: added}
        return None, sums, grad, None

    def add(carry: tuple[Any, Any], number: Any) -> tuple[tuple[Any, Any], None]:
        grad, sums = carry
        layer, pull = _layer(layers, number), pulls[number] if unrolled else _layer(pulls, number)
        by_layer, by_carry, _ = _with(pull, jax.tree.leaves((layer, context)))(grad)
        sums = jax.tree.map(lambda total, part: total.at[number].add(part.astype(total.dtype)), sums, by_layer)
        return (by_carry, sums), None

    carry = (grad, sums)
    if unrolled:
        for number in reversed(range(_depth(layers))):
            carry, _ = add(carry, number)
    else:
        carry, _ = jax.lax.scan(add, carry, jnp.arange(_depth(layers)), reverse=True)
    return None, carry[1], carry[0], None


def _depth(layers: Any) -> int:
    return len(jax.tree.leaves(layers)[0])


def _layer(stacked: Any, number: Any) -> Any:
    return jax.tree.map(lambda x: x[number], stacked)


run_adding.defvjp(_forward, _backward)
