# SPDX-License-Identifier: Apache-2.0
"""AdamW, or its variant with factored second moments: warm-up, a global-norm clip, and no decay on norms
and biases."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS
from llm_jepa_jax.config import OptConfig
from llm_jepa_jax.parallel.sharding import is_axes

SMALLEST_FACTORED = 32
"""Matrices whose smaller side is below this keep their whole second moment: there is little to save."""


def learning_rate(config: OptConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up (the first step already moves), then cosine, linear or constant until `num_steps`."""
    warmup = min(config.warmup_steps, num_steps)
    rest = max(1, num_steps - warmup)
    peak, final = config.learning_rate, config.learning_rate * config.final_scale
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_scale),
        "linear": optax.linear_schedule(peak, final, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, max(1, warmup)), after], [warmup])


def make_optimizer(config: OptConfig, num_steps: int, axes: Any, id_share: float = 1.0) -> optax.GradientTransformation:
    """The optimizer for parameters with these logical axes; one with a `norm` or `bias` axis is not decayed.

    `id_share` is the share of the vocabulary's rows that are ids: the padding behind them changes no update.
    """
    decayed = jax.tree.map(lambda names: not {"norm", "bias"} & set(names), axes, is_leaf=is_axes)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        *_scaling(config, id_share),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    )


def _scaling(config: OptConfig, id_share: float) -> tuple[optax.GradientTransformation, ...]:
    """Gradients divided by the root of their second moment, and averaged: Adam, or Adafactor's factored variant of it.

    Factored second moments are those of Shazeer & Stern (2018), clipped to a root mean square of 1 a parameter, with
    Adam's first moment after them, so the two take the same learning rates.
    """
    if config.second_moment == "full":
        return (optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=config.first_moment_dtype),)
    return (
        optax.scale_by_factored_rms(min_dim_size_to_factor=SMALLEST_FACTORED),
        optax.stateless(lambda updates, params: _clip_by_rms(updates, id_share)),
        optax.ema(config.beta1, accumulator_dtype=config.first_moment_dtype),
    )


def _clip_by_rms(updates: Any, id_share: float) -> Any:
    """Each parameter's update with a root mean square of at most 1, over what is no padding."""

    def clip(path: Any, update: jax.Array) -> jax.Array:
        share = id_share if path[-1].key in VOCABULARY_AXIS else 1.0
        return update / jnp.maximum(1.0, jnp.sqrt(jnp.mean(update**2) / share))

    return jax.tree_util.tree_map_with_path(clip, updates)
