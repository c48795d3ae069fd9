# SPDX-License-Identifier: Apache-2.0
"""Starting from a trained model: `init.checkpoint`."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jepa_jax.checkpoint.manager import restore_params
from llm_jepa_jax.config import Config, freeze, to_dict
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.from_json import load_json
from llm_jepa_jax.objectives.parameters import abstract_parameters, init_parameters
from llm_jepa_jax.parallel.sharding import parameter_shardings
from llm_jepa_jax.schema import flatten
from llm_jepa_jax.text.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer

LOG = logging.getLogger("llm_jepa_jax")
VOCABULARY_AXIS = {"embedding": 0, "head": 1}
"""The parameters with a row or a column for each token."""


def initial_run(config: Config) -> Config | None:
    """The configuration of the run to start from; nothing where weights are random.

    Raises:
        UserError: the directory is not that of a run, or its model has another shape.
    """
    if not config.init.checkpoint:
        return None
    directory = pathlib.Path(config.init.checkpoint)
    for name in ("config.json", "checkpoints"):
        if not (directory / name).exists():
            raise UserError(f"config: `init.checkpoint`={directory} has no {name}; name the directory of a run")
    saved = freeze(load_json(directory / "config.json"))
    before = flatten(to_dict(saved.model))
    for key, value in flatten(to_dict(config.model)).items():
        if key not in ("vocab_size", "max_positions", "init_std") and before[key] != value:
            raise UserError(
                f"config: `model.{key}`={value} is not the {before[key]} of `init.checkpoint`={directory}; "
                f"set --config.model.{key}={before[key]}"
            )
    return saved


def initial_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer named, which must begin with the pieces of the run to start from; else that run's own.

    Raises:
        UserError: an id of the run stands for something else.
    """
    saved = saved_tokenizer(pathlib.Path(config.init.checkpoint))
    if saved is None:
        raise UserError(f"config: `init.checkpoint`={config.init.checkpoint} has no tokenizer; copy the whole run")
    if not config.text.tokenizer:
        return saved
    tokenizer = load_tokenizer(config.text.tokenizer, config.text.chat_template)
    for index in range(saved.vocab_size):
        if index >= tokenizer.vocab_size or tokenizer.piece(index) != saved.piece(index):
            raise UserError(
                f"config: `text.tokenizer`={config.text.tokenizer} has not the piece {saved.piece(index)!r} of "
                f"`init.checkpoint` at id {index}; leave it out to take that run's tokenizer"
            )
    return tokenizer


def initial_parameters(key: jax.Array, config: Config, saved: Config, mesh: Mesh) -> Any:
    """The run's newest weights, with rows for new tokens and fresh linear predictors where it has none.

    Raises:
        UserError: no checkpoint can be read, or it has more tokens than this model.
    """
    old = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=saved.model.vocab_size))
    shapes, axes = abstract_parameters(old)
    known = abstract_parameters(saved)[0].get("predictors", {})
    fresh = set(shapes.get("predictors", {})) - set(known)
    for name in fresh:
        del shapes["predictors"][name], axes["predictors"][name]
    abstract = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        parameter_shardings(mesh, axes),
    )
    step, params = restore_params(pathlib.Path(config.init.checkpoint) / "checkpoints", abstract)
    new = config.model.vocab_size - saved.model.vocab_size
    LOG.info("weights of %s, step %d; %d new token rows", config.init.checkpoint, step, new)
    shardings = parameter_shardings(mesh, abstract_parameters(config)[1])
    with jax.set_mesh(mesh):
        return jax.jit(lambda params: _completed(key, params, config, new, fresh), out_shardings=shardings)(params)


def _completed(key: jax.Array, params: Any, config: Config, new: int, fresh: set[str]) -> Any:
    for number, (name, axis) in enumerate(VOCABULARY_AXIS.items()):
        if name in params and new:
            rows = _new_rows(jax.random.fold_in(key, number), params[name], axis, new, config)
            params |= {name: jnp.concatenate([params[name], rows], axis=axis)}
    if not fresh:
        return params
    drawn = init_parameters(key, config)["predictors"]
    return params | {"predictors": params.get("predictors", {}) | {name: drawn[name] for name in fresh}}


def _new_rows(key: jax.Array, weights: jax.Array, axis: int, new: int, config: Config) -> jax.Array:
    """Rows for tokens that the model does not know: the mean of those it knows, or normal."""
    shape = list(weights.shape)
    shape[axis] = new
    if config.init.new_rows == "mean":
        mean = jnp.mean(weights.astype(jnp.float32), axis=axis, keepdims=True)
        return jnp.broadcast_to(mean, shape).astype(weights.dtype)
    return (config.model.init_std * jax.random.normal(key, shape)).astype(weights.dtype)
