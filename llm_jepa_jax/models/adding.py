# SPDX-License-Identifier: Apache-2.0
"""Layers whose gradients are added to running sums while the backward pass goes through them.

Micro-batches as a rule hold two copies of all gradients: the sums so far, and those of the part in hand. Here the
backward loop carries the sums and adds each layer's gradient in place, so the second copy is one layer's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Block = Callable[[Any, jax.Array, Any], jax.Array]
"""(one layer's parameters, hidden states, context) to hidden states."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_adding(block: Block, layers: Any, sums: Any, hidden_RxLxD: jax.Array, context: Any) -> jax.Array:
    """Hidden states behind N layers, whose parameters are stacked in `layers` ([N, ...] each).

    The gradient by `sums` (a tree like `layers`) *is* the new sums: `sums` and the gradient by `layers` added up, in
    the type of `sums`. There is no gradient by `layers` itself, nor by `context`. Only the layers' inputs are kept for
    the backward pass, which computes each layer again.
    """
    return _forward(block, layers, sums, hidden_RxLxD, context)[0]


def _forward(block: Block, layers: Any, sums: Any, hidden_RxLxD: jax.Array, context: Any) -> tuple[jax.Array, Any]:
    def run(hidden: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        return block(layer, hidden, context), hidden

    hidden_RxLxD, inputs_NxRxLxD = jax.lax.scan(run, hidden_RxLxD, layers)
    return hidden_RxLxD, (layers, sums, inputs_NxRxLxD, context)


def _backward(block: Block, saved: Any, grad_RxLxD: jax.Array) -> tuple[Any, ...]:
    layers, sums, inputs_NxRxLxD, context = saved

    def add(carry: tuple[jax.Array, Any], number: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        grad, sums = carry
        layer, hidden = jax.tree.map(lambda x: x[number], (layers, inputs_NxRxLxD))
        by_layer, by_hidden = jax.vjp(lambda layer, hidden: block(layer, hidden, context), layer, hidden)[1](grad)
        sums = jax.tree.map(lambda total, part: total.at[number].add(part.astype(total.dtype)), sums, by_layer)
        return (by_hidden, sums), None

    numbers = jnp.arange(len(inputs_NxRxLxD))
    (grad_RxLxD, sums), _ = jax.lax.scan(add, (grad_RxLxD, sums), numbers, reverse=True)
    return None, sums, grad_RxLxD, None


run_adding.defvjp(_forward, _backward)
