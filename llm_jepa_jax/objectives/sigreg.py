# SPDX-License-Identifier: Apache-2.0
"""SIGReg: the views' embeddings should be distributed as an isotropic standard normal (LeJEPA, arXiv 2511.08544).

By Cramér and Wold, a distribution is standard normal when all its one-dimensional projections are. So embeddings are
projected on random directions, and each projection is held to the standard normal by the Epps-Pulley statistic, the
weighted squared distance of characteristic functions: smooth, bounded in gradient, and linear in the number of pairs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jepa_jax.objective_config import SigregConfig
from llm_jepa_jax.objectives.jepa import jepa_weight, pair_embeddings
from llm_jepa_jax.objectives.term import Inputs, Objective


def epps_pulley(projected_NxM: jax.Array, weight_N: jax.Array, config: SigregConfig) -> jax.Array:
    """The statistic of each of M projections, [M]: N ∫ |φ(t) − exp(−t²/2)|² exp(−t²/2) dt over −reach to reach.

    φ is the empirical characteristic function of the N values with weight 1. Both functions being symmetric, half of
    the integral is taken, by the trapezoidal rule on `knots` points.
    """
    points_K = jnp.linspace(0.0, config.reach, config.knots)
    spacing = config.reach / (config.knots - 1)
    normal_K = jnp.exp(-(points_K**2) / 2)
    trapezoid_K = jnp.full(config.knots, 2.0 * spacing).at[jnp.array([0, -1])].set(spacing) * normal_K
    count = jnp.sum(weight_N)
    share_N = weight_N / jnp.maximum(count, 1.0)
    turn_NxM = (jnp.cos(spacing * projected_NxM), jnp.sin(spacing * projected_NxM))

    def at_point(angle_NxM: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        """φ at one point, and the next angle's cosine and sine: a product of rotations costs less than they do."""
        cos_NxM, sin_NxM = angle_NxM
        following = (
            cos_NxM * turn_NxM[0] - sin_NxM * turn_NxM[1],
            sin_NxM * turn_NxM[0] + cos_NxM * turn_NxM[1],
        )
        return following, (share_N @ cos_NxM, share_N @ sin_NxM)

    start_NxM = (jnp.ones_like(projected_NxM), jnp.zeros_like(projected_NxM))
    _, (real_KxM, imaginary_KxM) = jax.lax.scan(at_point, start_NxM, None, length=config.knots)
    return count * trapezoid_K @ ((real_KxM - normal_K[:, None]) ** 2 + imaginary_KxM**2)


def sigreg_sum(inputs: Inputs) -> jax.Array:
    """Mean over directions and both views of the statistic, times the number of pairs (the term's weight); float32.

    The statistics are those of all pairs of the global batch. The directions are drawn from the step's key.
    """
    config, batch = inputs.config.sigreg, inputs.batch
    hidden_RxTxD = inputs.vectors(inputs.config.jepa)
    directions_DxM = jax.random.normal(inputs.key, (hidden_RxTxD.shape[-1], config.directions), jnp.float32)
    directions_DxM /= jnp.linalg.norm(directions_DxM, axis=0)
    weight_N = batch.pair_weight.reshape(-1)
    with jax.named_scope("sigreg_loss"):
        statistics = [
            epps_pulley(view.reshape(-1, view.shape[-1]) @ directions_DxM, weight_N, config).mean()
            for view in pair_embeddings(hidden_RxTxD, batch, inputs.config.jepa)
        ]
        return 0.5 * (statistics[0] + statistics[1]) * jepa_weight(batch)


SIGREG = Objective("sigreg", jepa_weight, sigreg_sum)
