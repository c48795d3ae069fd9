# SPDX-License-Identifier: Apache-2.0
"""Rows for tokens that a trained model does not have, and for none at all."""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jepa_jax.config import Config

VOCABULARY_AXIS = {"embedding": 0, "head": 1, "head_bias": 0}
"""The parameters with a row, a column or a place for each token."""


def with_new_rows(key: jax.Array, params: Any, config: Config, known: int) -> Any:
    """Parameters of `model.vocab_size` tokens, from those of a model that knows the first `known` of them.

    What they hold for other tokens, if anything, is not read: `init.new_rows` says what is put there. Behind them are
    the zeros of `ModelConfig.padded_vocab_size`.
    """
    size, padding = config.model.vocab_size, config.model.padded_vocab_size - config.model.vocab_size
    for number, (name, axis) in enumerate(VOCABULARY_AXIS.items()):
        if name in params and size > known:
            weights = jax.lax.slice_in_dim(params[name], 0, known, axis=axis)
            rows = _new_rows(jax.random.fold_in(key, number), weights, axis, size - known, config)
            padded = jnp.concatenate([weights, rows], axis=axis)
            room = [(0, padding if i == axis else 0) for i in range(weights.ndim)]
            params |= {name: jnp.pad(padded, room)}
    return params


def _new_rows(key: jax.Array, weights: jax.Array, axis: int, new: int, config: Config) -> jax.Array:
    """The mean of those it knows, or normal."""
    shape = list(weights.shape)
    shape[axis] = new
    if config.init.new_rows == "mean":
        mean = jnp.mean(weights.astype(jnp.float32), axis=axis, keepdims=True)
        return jnp.broadcast_to(mean, shape).astype(weights.dtype)
    return (config.model.init_std * jax.random.normal(key, shape)).astype(weights.dtype)
