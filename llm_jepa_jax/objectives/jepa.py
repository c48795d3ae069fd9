# SPDX-License-Identifier: Apache-2.0
"""Joint-embedding prediction between the two views: d(Pred(Enc(Text)), Enc(Code)) (LLM-JEPA, arXiv 2509.14252, eq. 2).

Enc is the hidden state at a view's last token (or the mean over the view); Pred is the model itself, run on k predictor
tokens behind the text view, so Pred(Enc(Text)) is the hidden state at the last of them. With
`jepa.direction=code_to_text` the views change places; with `jepa.placement=prepend` the predictor tokens come before a
view's content, and its end is read.
"""

import jax
import jax.numpy as jnp

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.objective_config import JepaConfig
from llm_jepa_jax.objectives.distance import distance_sum, predict
from llm_jepa_jax.objectives.term import Inputs, Objective, gather, mean_over


def jepa_weight(batch: Batch) -> jax.Array:
    """Number of pairs, float32 scalar."""
    return jnp.sum(batch.pair_weight, dtype=jnp.float32)


def pair_embeddings(hidden_RxTxD: jax.Array, batch: Batch, config: JepaConfig) -> tuple[jax.Array, jax.Array]:
    """The view that predicts and the one that is predicted, of every pair slot, each [R, P, D] float32.

    Pred(Enc(Text)) and Enc(Code), or with `jepa.direction=code_to_text` Pred(Enc(Code)) and Enc(Text).
    """
    if config.pooling == "last":
        views = (gather(hidden_RxTxD, index) for index in (batch.predictor_index, batch.code_index))
    else:
        spans = ((batch.predictor_start, batch.predictor_index), (batch.code_start, batch.code_index))
        views = (mean_over(hidden_RxTxD, _places(batch, *span)) for span in spans)
    source_RxPxD, target_RxPxD = (view.astype(jnp.float32) for view in views)
    return source_RxPxD, target_RxPxD


def _places(batch: Batch, start_RxP: jax.Array, end_RxP: jax.Array) -> jax.Array:
    """bool [R, P, T]: the places of each view, up to `end` included. A view that ends on its branch has the trunk up
    to where the branch hangs, and the branch."""
    length, width = batch.segments.shape[1], batch.tokens.shape[1]
    num_pairs = start_RxP.shape[1]
    branch = (width - length) // max(1, num_pairs)  # steps without pairs have no slots
    places_T, start_RxPx1, end_RxPx1 = jnp.arange(width), start_RxP[..., None], end_RxP[..., None]
    on_branch_RxPx1 = end_RxPx1 >= length
    trunk_end_RxPx1 = jnp.where(on_branch_RxPx1, batch.branch_end[..., None], end_RxPx1)
    trunk_RxPxT = (places_T >= start_RxPx1) & (places_T <= trunk_end_RxPx1)
    first_Px1 = length + branch * jnp.arange(num_pairs)[:, None]
    return trunk_RxPxT | (on_branch_RxPx1 & (places_T >= first_Px1) & (places_T <= end_RxPx1))


def jepa_sum(inputs: Inputs) -> jax.Array:
    """Sum of the distance over pairs, float32 scalar.

    The gradient reaches both views, as published, unless `jepa.stop_gradient` holds the predicted view still.
    """
    config, batch = inputs.config.jepa, inputs.batch
    with jax.named_scope("jepa_loss"):
        source_RxPxD, target_RxPxD = pair_embeddings(inputs.vectors(config), batch, config)
        if config.stop_gradient:
            target_RxPxD = jax.lax.stop_gradient(target_RxPxD)
        source_RxPxD = predict("jepa", source_RxPxD, config, inputs.predictors)
        return distance_sum(source_RxPxD, target_RxPxD, batch.pair_weight, config)


JEPA = Objective("jepa", jepa_weight, jepa_sum)
