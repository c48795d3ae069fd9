# SPDX-License-Identifier: Apache-2.0
"""What a run trains: the model's parameters, or adapters to them, and the linear predictors of objectives
(`predictors/NAME [D, D]`)."""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jepa_jax.config import Config
from llm_jepa_jax.models.lora import abstract_adapters, init_adapters
from llm_jepa_jax.models.transformer import abstract_params, init_params
from llm_jepa_jax.objective_config import ObjectiveConfig
from llm_jepa_jax.objectives.total import enabled


def _with_predictor(config: ObjectiveConfig) -> list[str]:
    """The enabled objectives that have one."""
    return [term.name for term in enabled(config) if getattr(term.section(config), "linear_predictor", False)]


def init_parameters(key: jax.Array, config: Config) -> Any:
    """What a run trains, drawn, as a plain nested dictionary; predictors are Xavier uniform, as published."""
    dtype, width = jnp.dtype(config.train.param_dtype), config.model.embed_dim
    params = init_adapters(key, config) if config.lora.rank else init_params(key, config.model, dtype)
    init = jax.nn.initializers.glorot_uniform()
    names = _with_predictor(config.objective)
    drawn = jax.random.fold_in(key, len("predictors"))
    predictors = {name: init(jax.random.fold_in(drawn, i), (width, width), dtype) for i, name in enumerate(names)}
    return params | ({"predictors": predictors} if predictors else {})


def abstract_parameters(config: Config) -> tuple[Any, Any]:
    """What a run trains and saves, as two trees: `jax.ShapeDtypeStruct`s, and each one's logical axes."""
    dtype, width = jnp.dtype(config.train.param_dtype), config.model.embed_dim
    shapes, axes = abstract_adapters(config) if config.lora.rank else abstract_params(config.model, dtype)
    names = _with_predictor(config.objective)
    if not names:
        return shapes, axes
    matrix = jax.ShapeDtypeStruct((width, width), dtype)
    return (
        shapes | {"predictors": dict.fromkeys(names, matrix)},
        axes | {"predictors": dict.fromkeys(names, ("embed", "predicted"))},
    )
