# SPDX-License-Identifier: Apache-2.0
"""How far apart two vectors are: the distances of LLM-JEPA (arXiv 2509.14252, section 4 and its ablations)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llm_jepa_jax.objective_config import VectorsConfig

EPSILON = 1e-8
"""Floor of the product of norms, as in the usual definition of cosine similarity."""


def cosine(a_xD: jax.Array, b_xD: jax.Array) -> jax.Array:
    """Cosine similarity along the last axis; differentiable at a zero vector."""
    squared = jnp.sum(a_xD**2, axis=-1) * jnp.sum(b_xD**2, axis=-1)
    return jnp.sum(a_xD * b_xD, axis=-1) * jax.lax.rsqrt(jnp.maximum(squared, EPSILON**2))


def length(x_xD: jax.Array) -> jax.Array:
    """Euclidean norm along the last axis; its gradient at 0 is 0."""
    squared = jnp.sum(x_xD**2, axis=-1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def distance_sum(
    source_RxPxD: jax.Array, target_RxPxD: jax.Array, weight_RxP: jax.Array, config: VectorsConfig
) -> jax.Array:
    """Weighted sum over slots of the distance of source and target (float32), float32 scalar.

    cosine: 1 − cos. l2: ‖s − t‖. mse: mean over dimensions of (s − t)². infonce: cross-entropy of picking a source's
    own target among all targets with a weight, by cosine / τ; the slots are all of the global batch.
    """
    if config.distance == "infonce":
        distance_RxP = _infonce(source_RxPxD, target_RxPxD, weight_RxP, config.temperature)
    elif config.distance == "l2":
        distance_RxP = length(source_RxPxD - target_RxPxD)
    elif config.distance == "mse":
        distance_RxP = jnp.mean((source_RxPxD - target_RxPxD) ** 2, axis=-1)
    else:
        distance_RxP = 1.0 - cosine(source_RxPxD, target_RxPxD)
    return jnp.sum(distance_RxP * weight_RxP)


def _infonce(source_RxPxD: jax.Array, target_RxPxD: jax.Array, weight_RxP: jax.Array, temperature: float) -> jax.Array:
    """[R, P] nats; 0 where a slot has no weight."""
    unit_s, unit_t = (x / jnp.maximum(length(x), EPSILON)[..., None] for x in (source_RxPxD, target_RxPxD))
    scores_RxPxQ = jnp.einsum("rpd,qd->rpq", unit_s, unit_t.reshape(-1, unit_t.shape[-1]), precision="highest")
    used_Q = weight_RxP.reshape(-1) > 0
    scores_RxPxQ = jnp.where(used_Q, scores_RxPxQ / temperature, -1e30)
    own_RxP = jnp.sum(unit_s * unit_t, axis=-1) / temperature
    return jnp.where(weight_RxP > 0, jax.nn.logsumexp(scores_RxPxQ, axis=-1) - own_RxP, 0.0)


def predict(
    name: str, source_RxPxD: jax.Array, config: VectorsConfig, predictors: Mapping[str, jax.Array]
) -> jax.Array:
    """The source after the objective's learned matrix, where it has one; float32."""
    if not config.linear_predictor:
        return source_RxPxD
    matrix_DxD = predictors[name].astype(jnp.float32)
    return jnp.einsum("rpd,de->rpe", source_RxPxD, matrix_DxD, precision="highest")
