# SPDX-License-Identifier: Apache-2.0
"""Joint-embedding prediction between the two views: d(Pred(Enc(Text)), Enc(Code)) (LLM-JEPA, arXiv 2509.14252, eq. 2).

Enc is the final hidden state at a view's last token; Pred is the model itself, run on k predictor tokens behind the
text view, so Pred(Enc(Text)) is the hidden state at the last of them. With `jepa.direction=code_to_text` the views
change places; with `jepa.placement=prepend` the predictor tokens come before a view's content, and its end is read.
"""

import jax
import jax.numpy as jnp

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.objectives.term import Inputs, Objective, gather

EPSILON = 1e-8
"""Floor of the product of norms, as in the usual definition of cosine similarity."""


def jepa_weight(batch: Batch) -> jax.Array:
    """Number of pairs, float32 scalar."""
    return jnp.sum(batch.pair_weight, dtype=jnp.float32)


def pair_embeddings(hidden_RxLxD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The view that predicts and the one that is predicted, of every pair slot, each [R, P, D] float32.

    Pred(Enc(Text)) and Enc(Code), or with `jepa.direction=code_to_text` Pred(Enc(Code)) and Enc(Text).
    """
    source_RxPxD = gather(hidden_RxLxD, batch.predictor_index).astype(jnp.float32)
    target_RxPxD = gather(hidden_RxLxD, batch.code_index).astype(jnp.float32)
    return source_RxPxD, target_RxPxD


def cosine(a_RxPxD: jax.Array, b_RxPxD: jax.Array) -> jax.Array:
    """Cosine similarity along the last axis, [R, P]; differentiable at a zero vector."""
    squared_RxP = jnp.sum(a_RxPxD**2, axis=-1) * jnp.sum(b_RxPxD**2, axis=-1)
    return jnp.sum(a_RxPxD * b_RxPxD, axis=-1) * jax.lax.rsqrt(jnp.maximum(squared_RxP, EPSILON**2))


def jepa_sum(inputs: Inputs) -> jax.Array:
    """Sum of 1 - cos over pairs, float32 scalar.

    The gradient reaches both views, as published, unless `jepa.stop_gradient` holds the predicted view still.
    """
    with jax.named_scope("jepa_loss"):
        source_RxPxD, target_RxPxD = pair_embeddings(inputs.hidden_RxLxD, inputs.batch)
        if inputs.config.jepa.stop_gradient:
            target_RxPxD = jax.lax.stop_gradient(target_RxPxD)
        cosine_RxP = cosine(source_RxPxD, target_RxPxD)
        return jnp.sum((1.0 - cosine_RxP) * inputs.batch.pair_weight)


JEPA = Objective(name="jepa", scale=lambda config: config.jepa.weight, weight=jepa_weight, total=jepa_sum)
