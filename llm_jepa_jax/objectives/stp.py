# SPDX-License-Identifier: Apache-2.0
"""Semantic tube prediction (STP, arXiv 2602.22617): hidden states of one sequence should move along a line.

The displacement over a span of tokens, Enc(end) − Enc(start), should point where that over the rest of the text points.
It takes no second view and no further pass: only indices of hidden states that are there anyway. The exceptions are the
ablations `mask` and `mask_recover`, which encode texts of their own. Columns of `Batch.span_points` ([R, S, 6]) are

    USER_BEFORE, USER_END, CODE_BEFORE, CODE_END, SPAN_BEFORE, SPAN_END

Each names a place: the last token before the user's content, the last token of it, the same of the assistant's, and of
the span. A span that begins in the one and ends in the other leaves out what lies between. In the `mask` modes the last
two are the ends of the masked text and of what it is compared with, and the others mean nothing.
"""

import jax
import jax.numpy as jnp

from llm_jepa_jax.batch import CODE_BEFORE, CODE_END, SPAN_BEFORE, SPAN_END, USER_BEFORE, USER_END, Batch
from llm_jepa_jax.objectives.distance import distance_sum, length, predict
from llm_jepa_jax.objectives.term import Inputs, Objective, gather, mean_over


def stp_weight(batch: Batch) -> jax.Array:
    """Sum of the spans' weights, float32 scalar."""
    return jnp.sum(batch.span_weight, dtype=jnp.float32)


def _at(hidden_RxTxD: jax.Array, batch: Batch, column: int) -> jax.Array:
    """Hidden state at one column of the span points, float32 [R, S, D]."""
    return gather(hidden_RxTxD, batch.span_points[..., column]).astype(jnp.float32)


def displacements(hidden_RxTxD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Over the rest of the text and over the span, each [R, S, D] float32; together they make the whole."""
    points_RxSx6 = batch.span_points
    user_before, user_end, code_before, code_end, start, end = (_at(hidden_RxTxD, batch, column) for column in range(6))
    crosses_RxS = (points_RxSx6[..., SPAN_BEFORE] < points_RxSx6[..., USER_END]) & (
        points_RxSx6[..., SPAN_END] >= points_RxSx6[..., CODE_BEFORE]
    )
    span_RxSxD = end - start + jnp.where(crosses_RxS[..., None], user_end - code_before, 0.0)
    return user_end - user_before + code_end - code_before - span_RxSxD, span_RxSxD


def means(hidden_RxTxD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Mean hidden state of the user's and of the assistant's content, each [R, S, D] float32."""
    return (
        mean_over(hidden_RxTxD, _between(hidden_RxTxD, batch, USER_BEFORE, USER_END)),
        mean_over(hidden_RxTxD, _between(hidden_RxTxD, batch, CODE_BEFORE, CODE_END)),
    )


def _between(hidden_RxTxD: jax.Array, batch: Batch, before: int, end: int, skip: int = 0) -> jax.Array:
    """bool [R, S, T]: the places behind one column up to another, without the first `skip`."""
    places_T = jnp.arange(hidden_RxTxD.shape[1])
    before_RxSx1, end_RxSx1 = batch.span_points[..., before, None], batch.span_points[..., end, None]
    return (places_T > before_RxSx1 + skip) & (places_T <= end_RxSx1)


def curvatures(hidden_RxTxD: jax.Array, batch: Batch) -> jax.Array:
    """Mean angle between a token's step and the one before it, over the contents of each slot: [R, S], radians.

    The angle of unit vectors u and v is 2 atan2(‖u − v‖, ‖u + v‖) (Kahan), exact and with a finite gradient on a
    straight line too, where acos has none. The first step of a content leads to its first token. 0 without any angle.
    """
    steps_RxTxD = jnp.diff(hidden_RxTxD.astype(jnp.float32), axis=1, prepend=jnp.zeros_like(hidden_RxTxD[:, :1]))
    size_RxT = length(steps_RxTxD)
    unit_RxTxD = jnp.where(size_RxT > 0, 1.0 / jnp.where(size_RxT > 0, size_RxT, 1.0), 0.0)[..., None] * steps_RxTxD
    before_RxTxD = jnp.roll(unit_RxTxD, 1, axis=1)
    apart_RxT, together_RxT = length(unit_RxTxD - before_RxTxD), length(unit_RxTxD + before_RxTxD)
    angle_RxT = 2.0 * jnp.arctan2(apart_RxT, together_RxT)
    inside_RxSxT = _between(hidden_RxTxD, batch, USER_BEFORE, USER_END, 1) | _between(
        hidden_RxTxD, batch, CODE_BEFORE, CODE_END, 1
    )
    return mean_over(angle_RxT[..., None], inside_RxSxT)[..., 0]


def stp_sum(inputs: Inputs) -> jax.Array:
    """Weighted sum over spans of the distance of their two vectors, or of the curvature; float32 scalar."""
    config, batch = inputs.config.stp, inputs.batch
    hidden_RxTxD = inputs.vectors(config)
    with jax.named_scope("stp_loss"):
        if config.mode == "curvature":
            return jnp.sum(curvatures(hidden_RxTxD, batch) * batch.span_weight)
        if config.mode == "mean":
            source_RxSxD, target_RxSxD = means(hidden_RxTxD, batch)
        elif config.adds_segments:
            source_RxSxD, target_RxSxD = (_at(hidden_RxTxD, batch, column) for column in (SPAN_BEFORE, SPAN_END))
        else:
            source_RxSxD, target_RxSxD = displacements(hidden_RxTxD, batch)
        source_RxSxD = predict("stp", source_RxSxD, config, inputs.predictors)
        return distance_sum(source_RxSxD, target_RxSxD, batch.span_weight, config)


STP = Objective("stp", stp_weight, stp_sum)
