# SPDX-License-Identifier: Apache-2.0
"""Variance and covariance regularisation of both views' embeddings: what keeps JEPA from collapsing.

VICReg (Bardes, Ponce & LeCun, 2022, eq. 1 and 4), on embeddings scaled to length sqrt(D), so that only directions
count, as they do for the cosine.
"""

import jax
import jax.numpy as jnp

from llm_jepa_jax.objectives.jepa import jepa_weight, pair_embeddings
from llm_jepa_jax.objectives.term import Inputs, Objective

VARIANCE_FLOOR = 1e-4
"""Added to variances under the square root, as published."""


def spread_loss(embeddings_NxD: jax.Array, weight_N: jax.Array, target_std: float, covariance: float) -> jax.Array:
    """How far the embeddings with weight 1 are from spread: float32 scalar; 0 for fewer than two of them.

    The mean over dimensions of max(0, target − std), plus `covariance` times the sum of squared off-diagonal
    covariances over D.
    """
    width = embeddings_NxD.shape[1]
    count = jnp.sum(weight_N)
    norms_N = jnp.sqrt(jnp.sum(embeddings_NxD**2, axis=1) + 1e-12)
    unit_NxD = embeddings_NxD * (width**0.5 / norms_N)[:, None]
    mean_D = weight_N @ unit_NxD / jnp.maximum(count, 1.0)
    centred_NxD = (unit_NxD - mean_D) * weight_N[:, None]
    covariance_DxD = centred_NxD.T @ centred_NxD / jnp.maximum(count - 1.0, 1.0)
    variance_D = jnp.diagonal(covariance_DxD)
    variance_loss = jnp.mean(jax.nn.relu(target_std - jnp.sqrt(variance_D + VARIANCE_FLOOR)))
    covariance_loss = (jnp.sum(covariance_DxD**2) - jnp.sum(variance_D**2)) / width
    return jnp.where(count >= 2.0, variance_loss + covariance * covariance_loss, 0.0)


def vicreg_sum(inputs: Inputs) -> jax.Array:
    """Mean of both views' spread loss, times the number of pairs (the term's weight), float32 scalar.

    The statistics are those of all pairs of the global batch.
    """
    config, batch = inputs.config.vicreg, inputs.batch
    weight_N = batch.pair_weight.reshape(-1)
    with jax.named_scope("vicreg_loss"):
        losses = [
            spread_loss(view.reshape(-1, view.shape[-1]), weight_N, config.target_std, config.covariance)
            for view in pair_embeddings(inputs.vectors(inputs.config.jepa), batch, inputs.config.jepa)
        ]
        return 0.5 * (losses[0] + losses[1]) * jepa_weight(batch)


VICREG = Objective("vicreg", jepa_weight, vicreg_sum)
