# SPDX-License-Identifier: Apache-2.0
"""What an objective is: a weight known from the batch alone, and a sum computed from hidden states.

A loss is `sum / weight` over the whole global batch. Because the weight needs no forward pass, the step divides by the
global one from the start, and micro-batches and devices only ever add.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.config import ObjectiveConfig


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What objectives compute from, for R rows."""

    hidden_RxLxD: jax.Array
    """Hidden states after the final norm, compute type."""
    head_DxV: jax.Array
    """Head of the language model, parameter type."""
    batch: Batch
    config: ObjectiveConfig
    soft_cap: float = 0.0
    """`model.logit_soft_cap`."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """One loss term."""

    name: str
    scale: Callable[[ObjectiveConfig], float]
    """Its factor in the total (γ, λ); the term is on when this is not 0."""
    weight: Callable[[Batch], jax.Array]
    """float32 scalar: targets or pairs in these rows."""
    total: Callable[[Inputs], jax.Array]
    """float32 scalar: the sum of the loss over those targets or pairs."""


def gather(array_RxLxD: jax.Array, index_RxM: jax.Array) -> jax.Array:
    """`out[r, m] = array[r, index[r, m]]`, shape [R, M, D]."""
    return jnp.take_along_axis(array_RxLxD, index_RxM[:, :, None], axis=1)
