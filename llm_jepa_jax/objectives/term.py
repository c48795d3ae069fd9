# SPDX-License-Identifier: Apache-2.0
"""What an objective is: a weight known from the batch alone, and a sum computed from hidden states.

A loss is `sum / weight` over the whole global batch. Because the weight needs no forward pass, the step divides by the
global one from the start, and micro-batches and devices only ever add.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.models.transformer import State
from llm_jepa_jax.objective_config import ObjectiveConfig, TermConfig, VectorsConfig
from llm_jepa_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What objectives compute from, for R rows."""

    states: Mapping[State, jax.Array]
    """Hidden states [R, T, D] of the layers that the enabled objectives look at, compute type."""
    head_DxV: jax.Array
    """Head of the language model, parameter type."""
    batch: Batch
    config: ObjectiveConfig
    num_layers: int
    soft_cap: float = 0.0
    """`model.logit_soft_cap`."""
    head_bias_V: jax.Array | None = None
    """What is added to the logits, if anything, parameter type."""
    predictors: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    """Matrix [D, D] of each objective with `linear_predictor`, parameter type."""
    key: jax.Array = dataclasses.field(default_factory=lambda: jax.random.key(0))
    """Random key of the step, the same on every device and for every micro-batch."""
    num_ids: int = 0
    """Columns of the head that are ids; what follows is padding. 0: all are."""

    @property
    def last_RxTxD(self) -> jax.Array:
        """The hidden state that the language model's head reads."""
        return self.states[last_state(self.num_layers)]

    def vectors(self, config: VectorsConfig) -> jax.Array:
        """The hidden state [R, T, D] that an objective compares."""
        return self.states[state_of(config, self.num_layers)]


@dataclasses.dataclass(frozen=True)
class Objective:
    """One loss term. Its name is that of its section of the configuration."""

    name: str
    weight: Callable[[Batch], jax.Array]
    """float32 scalar: targets, pairs or spans in these rows."""
    total: Callable[[Inputs], jax.Array]
    """float32 scalar: the sum of the loss over those."""

    def section(self, config: ObjectiveConfig) -> Any:
        """Its own keys."""
        return getattr(config, self.name)


def last_state(num_layers: int) -> State:
    """Behind the last block, after the final norm."""
    return num_layers, True


def state_of(config: VectorsConfig, num_layers: int) -> State:
    """The hidden state that an objective compares, its layer counted from 0."""
    layer = config.layer if config.layer >= 0 else config.layer + num_layers + 1
    return layer, config.final_norm


def scale(config: TermConfig, step: jax.Array | int, num_steps: int) -> jax.Array | float:
    """Factor of a term in the total at a step (from 0) of a run of `num_steps`."""
    if config.schedule == "constant":
        return config.weight
    last = max(1, (config.schedule_steps or num_steps) - 1)
    return config.min_weight + (config.weight - config.min_weight) * jnp.minimum(1.0, step / last)


def gather(array_RxLxD: jax.Array, index_RxM: jax.Array) -> jax.Array:
    """`out[r, m] = array[r, index[r, m]]`, shape [R, M, D]."""
    # XLA aborts on taking places from rows that are cut, within a part of the mesh that is cut by hand (jaxlib 0.10.2).
    array_RxLxD = constrain(array_RxLxD, "rows", "whole_length", "embed")
    return jnp.take_along_axis(array_RxLxD, index_RxM[:, :, None], axis=1)


def mean_over(array_RxTxD: jax.Array, chosen_RxMxT: jax.Array) -> jax.Array:
    """Mean over the chosen places of a row, float32 [R, M, D]; 0 where none is chosen."""
    chosen_RxMxT = chosen_RxMxT.astype(jnp.float32)
    count_RxM = jnp.sum(chosen_RxMxT, axis=-1)
    total_RxMxD = jnp.einsum("rmt,rtd->rmd", chosen_RxMxT, array_RxTxD.astype(jnp.float32), precision="highest")
    return total_RxMxD / jnp.maximum(count_RxM, 1.0)[..., None]
