# SPDX-License-Identifier: Apache-2.0
"""The total: the sum of weighted terms, each divided by its weight over the whole global batch."""

import jax
import jax.numpy as jnp

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.config import ObjectiveConfig
from llm_jepa_jax.objectives.jepa import JEPA
from llm_jepa_jax.objectives.ntp import NTP
from llm_jepa_jax.objectives.term import Inputs, Objective
from llm_jepa_jax.objectives.vicreg import VICREG

OBJECTIVES: tuple[Objective, ...] = (NTP, JEPA, VICREG)
"""Every objective there is: a new one is a file and an entry here."""


def enabled(config: ObjectiveConfig) -> tuple[Objective, ...]:
    """The objectives whose weight is not 0."""
    return tuple(objective for objective in OBJECTIVES if objective.scale(config))


def term_weights(batch: Batch, config: ObjectiveConfig) -> dict[str, jax.Array]:
    """Weight of each enabled term over these rows: its denominator, known before any forward pass."""
    return {objective.name: objective.weight(batch) for objective in enabled(config)}


def total_loss(inputs: Inputs, weights: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total over these rows and each term's sum, float32 scalars.

    `weights` are those of the whole global batch, so totals and gradients of micro-batches simply add up. A term whose
    weight is 0 contributes 0 here; the loop reports that it had none.
    """
    total = jnp.zeros((), jnp.float32)
    sums = {}
    for objective in enabled(inputs.config):
        sums[objective.name] = objective.total(inputs)
        total += objective.scale(inputs.config) * sums[objective.name] / jnp.maximum(weights[objective.name], 1.0)
    return total, sums
