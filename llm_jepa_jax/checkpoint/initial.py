# SPDX-License-Identifier: Apache-2.0
"""Starting from a trained model: `init.checkpoint`, a run's directory or a published model."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jepa_jax.checkpoint.hf_directory import HfCheckpoint, is_published, open_directory
from llm_jepa_jax.checkpoint.hf_import import read_parameters
from llm_jepa_jax.checkpoint.manager import restore_params
from llm_jepa_jax.checkpoint.peft import open_adapter, read_adapter
from llm_jepa_jax.checkpoint.places import Place, on_this_machine, place
from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS, with_new_rows
from llm_jepa_jax.config import Config, ModelConfig, freeze, to_dict
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.from_json import load_json
from llm_jepa_jax.models.lora import abstract_adapters, init_adapters
from llm_jepa_jax.objectives.parameters import abstract_parameters, init_parameters
from llm_jepa_jax.parallel.sharding import parameter_shardings, placed
from llm_jepa_jax.schema import flatten, freeze_section, unflatten
from llm_jepa_jax.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, saved_tokenizer

LOG = logging.getLogger("llm_jepa_jax")
SMALLEST_SHARE = 0.9
"""Of an embedding's rows, that the ids of its tokenizer must be."""
OWN_KEYS = ("max_positions", "init_std", "family")
"""Keys of the model that may differ from those of the checkpoint."""


@dataclasses.dataclass(frozen=True)
class Initial:
    """A trained model to start from."""

    directory: Place
    source: Config | HfCheckpoint
    """The configuration of a run, or a published model."""

    @property
    def model(self) -> ModelConfig:
        """What it is; its vocabulary's size is that of its weights."""
        return self.source.model


def open_initial(config: Config) -> Initial | None:
    """The model that `init.checkpoint` names; nothing where weights are random.

    Raises:
        UserError: the directory is neither that of a run nor that of a published model that is supported.
    """
    if not config.init.checkpoint:
        return None
    directory = place(config.init.checkpoint)
    if is_published(directory):
        if config.init.step:
            raise UserError(
                f"config: `init.step`={config.init.step} is for a run, and {directory} is none; leave it out"
            )
        return Initial(directory, open_directory(directory))
    for name in ("config.json", "checkpoints"):
        if not (directory / name).exists():
            raise UserError(
                f"config: `init.checkpoint`={directory} has no {name}; name the directory of a run or a published model"
            )
    source = freeze(load_json(directory / "config.json"))
    if source.lora.rank:
        raise UserError(
            f"config: `init.checkpoint`={directory} is a run that trained adapters; write its model with "
            "--mode=export, and name that directory"
        )
    return Initial(directory, source)


def with_initial(config: Config, start: Initial | None) -> Config:
    """The configuration with the model's keys of the checkpoint, where it leaves them at their defaults.

    Raises:
        UserError: a key is set to another value than the checkpoint's.
    """
    if start is None:
        return config
    theirs, defaults = flatten(to_dict(start.model)), flatten(to_dict(ModelConfig()))
    values = flatten(to_dict(config.model))
    for key, value in values.items():
        if key in ("vocab_size", "vocab_multiple"):
            continue  # what holds the tokenizer and the checkpoint, on this mesh: `vocabulary.with_vocabulary`
        if value == defaults[key]:
            values[key] = theirs[key]
        elif value != theirs[key] and key not in OWN_KEYS:
            raise UserError(
                f"config: `model.{key}`={value} is not the {theirs[key]} of `init.checkpoint`={start.directory}; "
                f"set --config.model.{key}={theirs[key]}"
            )
    return dataclasses.replace(config, model=freeze_section(ModelConfig, unflatten(values), "model."))


def initial_tokenizer(config: Config, start: Initial) -> Tokenizer:
    """The tokenizer named, which must begin with the pieces of the run to start from; else that run's own.

    Raises:
        UserError: an id of the run stands for something else, or a published model comes without a tokenizer.
    """
    files = on_this_machine(start.directory)
    saved = saved_tokenizer(files)
    if isinstance(start.source, HfCheckpoint) and has_tokenizer(files):
        saved = load_tokenizer(files, config.text.chat_template)
        _check_of_one_model(start, saved)
    if saved is None and config.text.tokenizer:
        return load_tokenizer(config.text.tokenizer, config.text.chat_template)
    if saved is None:
        raise UserError(f"config: `init.checkpoint`={start.directory} has no tokenizer; name one with `text.tokenizer`")
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


def _check_of_one_model(start: Initial, tokenizer: Tokenizer) -> None:
    """Published vocabularies are padded by a few percent at most; a tokenizer far below that is another model's."""
    known = tokenizer.vocab_size - len(tokenizer.new_ids)
    if known < SMALLEST_SHARE * start.model.vocab_size:
        raise UserError(
            f"config: `init.checkpoint`={start.directory}: its tokenizer has {known} ids and its embedding "
            f"{start.model.vocab_size} rows, so they are of different models; bring the right tokenizer files there"
        )


def initial_parameters(key: jax.Array, config: Config, start: Initial, mesh: Mesh) -> Any:
    """What a run trains, as it begins: the checkpoint's weights, with rows for new tokens, or adapters to them; and its
    linear predictors, fresh where it has none.

    Raises:
        UserError: no checkpoint can be read.
    """
    shapes, axes = abstract_parameters(config)
    shardings = parameter_shardings(mesh, axes)
    params = {} if isinstance(start.source, HfCheckpoint) else _of_run(config, start, mesh)
    if config.lora.rank:
        params |= _adapters(key, config, start, mesh)
    else:
        if isinstance(start.source, HfCheckpoint):
            params = read_parameters(start.source, mesh, config.train.param_dtype, config.model.padded_vocab_size)
        params = with_rows(key, params, config, start)
    fresh = set(shapes.get("predictors", {})) - set(params.get("predictors", {}))
    with jax.set_mesh(mesh):
        if fresh:
            make = jax.jit(lambda: init_parameters(key, config)["predictors"], out_shardings=shardings["predictors"])
            params["predictors"] = make() | params.get("predictors", {})
    return params


def with_rows(key: jax.Array, params: Any, config: Config, start: Initial) -> Any:
    """The weights of a checkpoint with rows for the tokens that it does not have."""
    new = config.model.vocab_size - start.model.vocab_size
    LOG.info("weights of %s; %d new token rows", config.init.checkpoint, new)
    changed = {name: params[name] for name in VOCABULARY_AXIS if name in params and new}
    shardings = {name: array.sharding for name, array in changed.items()}
    make = jax.jit(lambda old: with_new_rows(key, old, config, start.model.vocab_size), out_shardings=shardings)
    return params | make(changed)


def _adapters(key: jax.Array, config: Config, start: Initial, mesh: Mesh) -> Any:
    """Those of `lora.adapter`, or fresh ones."""
    shapes, axes = abstract_adapters(config)
    abstract = placed(shapes, parameter_shardings(mesh, axes))
    if config.lora.adapter:
        return read_adapter(open_adapter(pathlib.Path(config.lora.adapter), start.model), abstract)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: init_adapters(key, config), out_shardings=shardings)()


def _of_run(config: Config, start: Initial, mesh: Mesh) -> Any:
    """What this run trains and the one to start from has, with those linear predictors that both have."""
    old = dataclasses.replace(
        config, model=dataclasses.replace(start.model, vocab_multiple=config.model.vocab_multiple)
    )
    shapes, axes = abstract_parameters(old)
    if config.lora.rank:
        del shapes["layers"], axes["layers"]
    known = abstract_parameters(start.source)[0].get("predictors", {})
    for name in set(shapes.get("predictors", {})) - set(known):
        del shapes["predictors"][name], axes["predictors"][name]
    abstract = placed(shapes, parameter_shardings(mesh, axes))
    if not jax.tree.leaves(abstract):
        return {}
    step, params = restore_params(start.directory / "checkpoints", abstract, config.init.step or None)
    LOG.info("step %d of %s", step, start.directory)
    return params
