# SPDX-License-Identifier: Apache-2.0
"""The total: the sum of weighted terms, each divided by its weight over the whole global batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.models.transformer import State
from llm_jepa_jax.objective_config import ObjectiveConfig
from llm_jepa_jax.objectives.jepa import JEPA
from llm_jepa_jax.objectives.ntp import NTP
from llm_jepa_jax.objectives.sigreg import SIGREG
from llm_jepa_jax.objectives.stp import STP
from llm_jepa_jax.objectives.term import Inputs, Objective, last_state, scale, state_of
from llm_jepa_jax.objectives.vicreg import VICREG

OBJECTIVES: tuple[Objective, ...] = (NTP, JEPA, STP, VICREG, SIGREG)
"""Every objective there is: a new one is a file and an entry here."""


def enabled(config: ObjectiveConfig) -> tuple[Objective, ...]:
    """The objectives whose weight is not 0."""
    return tuple(objective for objective in OBJECTIVES if objective.section(config).weight)


def term_weights(batch: Batch, config: ObjectiveConfig) -> dict[str, jax.Array]:
    """Weight of each enabled term over these rows: its denominator, known before any forward pass."""
    return {objective.name: objective.weight(batch) for objective in enabled(config)}


def term_scales(config: ObjectiveConfig, step: jax.Array | int, num_steps: int) -> dict[str, Any]:
    """Factor of each enabled term in the total, at a step of the run."""
    return {objective.name: scale(objective.section(config), step, num_steps) for objective in enabled(config)}


def wanted_states(config: ObjectiveConfig, num_layers: int) -> tuple[State, ...]:
    """The hidden states that the enabled terms, and the diagnostics of the views, look at."""
    sections = [objective.section(config) for objective in enabled(config)] + [config.jepa]
    others = {state_of(section, num_layers) for section in sections if hasattr(section, "layer")}
    return tuple(sorted(others | {last_state(num_layers)}))


def total_loss(
    inputs: Inputs, weights: Mapping[str, jax.Array], scales: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total over these rows and each term's sum, float32 scalars.

    `weights` are those of the whole global batch, so totals and gradients of micro-batches simply add up. A term whose
    weight is 0 contributes 0 here; the loop reports that it had none.
    """
    total = jnp.zeros((), jnp.float32)
    sums = {}
    for objective in enabled(inputs.config):
        sums[objective.name] = objective.total(inputs)
        weight = weights[objective.name]
        total += scales[objective.name] * sums[objective.name] / jnp.where(weight > 0, weight, 1.0)
    return total, sums
