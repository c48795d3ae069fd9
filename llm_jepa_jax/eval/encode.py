# SPDX-License-Identifier: Apache-2.0
"""Embeddings of views, in batches of few shapes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.models.transformer import State, forward_states
from llm_jepa_jax.objective_config import JepaConfig
from llm_jepa_jax.objectives.term import gather, mean_over, state_of
from llm_jepa_jax.parallel.sharding import num_row_shards, rows_sharding
from llm_jepa_jax.text.chat import VIEW_ROLES, render_view, view_tokens
from llm_jepa_jax.text.tokenizer import Tokenizer

BATCH_SIZE = 64
LENGTH_MULTIPLE = 32


def view_ids(
    tokenizer: Tokenizer, config: JepaConfig, view: str, contents: Sequence[str], num_predictors: int | None = None
) -> list[np.ndarray]:
    """Token ids of views (`text` or `code`) as rows hold them, predictor tokens included.

    `num_predictors` defaults to what the view has in training: k for the one that predicts, none for the other.
    """
    count = (config.num_predictors if view == config.source else 0) if num_predictors is None else num_predictors
    parts = view_tokens(tokenizer, config, count)
    if view != config.source:
        parts = dataclasses.replace(parts, end=parts.predicted_end)
    return [parts.predicting(*render_view(tokenizer, VIEW_ROLES[view], content)) for content in contents]


def pad_right(sequences: Sequence[Sequence[int] | np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [rows, L], padded on the right with 0 to a shared bucketed length, and each sequence's length."""
    longest = max(len(sequence) for sequence in sequences)
    tokens_RxL = np.zeros((rows, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE), np.int32)
    lengths_R = np.ones(rows, np.int32)
    for row, sequence in enumerate(sequences):
        tokens_RxL[row, : len(sequence)] = sequence
        lengths_R[row] = len(sequence)
    return tokens_RxL, lengths_R


@functools.partial(jax.jit, static_argnames=("config", "dtype", "states"))
def hidden_states(
    params: Any,
    tokens_RxL: jax.Array,
    lengths_R: jax.Array,
    *,
    config: ModelConfig,
    dtype: Any,
    states: tuple[State, ...] = (),
) -> tuple[jax.Array, ...]:
    """Hidden states [R, L, D] of right-padded sequences; without `states`, those after the final norm."""
    places_RxL = jnp.broadcast_to(jnp.arange(tokens_RxL.shape[1]), tokens_RxL.shape)
    segments_RxL = (places_RxL < lengths_R[:, None]).astype(jnp.int32)
    return forward_states(params, config, tokens_RxL, places_RxL, segments_RxL, dtype=dtype, states=states)


@functools.partial(jax.jit, static_argnames=("config", "jepa", "dtype"))
def _embeddings(
    params: Any, tokens_RxL: jax.Array, lengths_R: jax.Array, *, config: ModelConfig, jepa: JepaConfig, dtype: Any
) -> jax.Array:
    states = (state_of(jepa, config.num_layers),)
    (hidden_RxLxD,) = hidden_states(params, tokens_RxL, lengths_R, config=config, dtype=dtype, states=states)
    end_Rx1 = jnp.maximum(lengths_R - 1 - jepa.view_end_offset, 0)[:, None]
    if jepa.pooling == "last":
        return gather(hidden_RxLxD, end_Rx1)[:, 0].astype(jnp.float32)
    return mean_over(hidden_RxLxD, (jnp.arange(tokens_RxL.shape[1]) <= end_Rx1)[:, None])[:, 0]


def encode(
    params: Any,
    config: ModelConfig,
    jepa: JepaConfig,
    sequences: Sequence[Sequence[int] | np.ndarray],
    mesh: Mesh,
    dtype: Any,
) -> np.ndarray:
    """The embedding of each view as training compares it (layer, end, pooling), before any linear predictor.

    Returns:
        float32 [n, D], in the order given.
    """
    out_NxD = np.zeros((len(sequences), config.embed_dim), np.float32)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    shards = num_row_shards(mesh)
    rows = -(-min(BATCH_SIZE, max(1, len(sequences))) // shards) * shards
    everywhere = jax.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            arrays = pad_right([sequences[i] for i in chosen], rows)
            placed = [jax.make_array_from_callback(a.shape, rows_sharding(mesh), a.__getitem__) for a in arrays]
            embedded = _embeddings(params, *placed, config=config, jepa=jepa, dtype=dtype)
            out_NxD[chosen] = np.asarray(jax.device_put(embedded, everywhere))[: len(chosen)]
    return out_NxD
