# SPDX-License-Identifier: Apache-2.0
"""The weights that adapters lie beside: read from `init.checkpoint` whenever a run is opened, never saved with it."""

import dataclasses
import functools
import hashlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jepa_jax.checkpoint.hf_directory import HfCheckpoint
from llm_jepa_jax.checkpoint.hf_import import read_parameters
from llm_jepa_jax.checkpoint.hf_layout import at
from llm_jepa_jax.checkpoint.initial import Initial, open_initial, with_rows
from llm_jepa_jax.checkpoint.manager import restore_params, saved_steps
from llm_jepa_jax.config import Config
from llm_jepa_jax.models.lora import abstract_frozen, frozen_dtype, frozen_from, stored, with_scales
from llm_jepa_jax.models.transformer import abstract_params, init_params
from llm_jepa_jax.parallel.sharding import is_axes, parameter_shardings

LOG = logging.getLogger("llm_jepa_jax")
SAMPLE = 4096
"""Bytes of each tensor that tell one checkpoint from another of the same shapes."""


def frozen_parameters(config: Config, mesh: Mesh) -> Any:
    """The frozen tree of a run with adapters, as it keeps them; a full-precision copy of it never exists.

    Rows of new tokens come out the same every time: from the seed, and from the rows there are. Without
    `init.checkpoint` the weights are those that the seed draws, good for trying things out.

    Raises:
        UserError: the weights of `init.checkpoint` cannot be read.
    """
    key, start = jax.random.key(config.seed), open_initial(config)
    shardings = parameter_shardings(mesh, abstract_frozen(config)[1])
    if start is None:
        LOG.warning("adapters beside random weights (seed %d): set init.checkpoint for a trained model", config.seed)
        draw = jax.jit(
            lambda: frozen_from(init_params(key, config.model, jnp.float32), config), out_shardings=shardings
        )
        return draw()
    if isinstance(start.source, HfCheckpoint):
        params = read_parameters(start.source, mesh, "float32", config.model.padded_vocab_size, config)
    else:
        params = _of_run(config, start, mesh)
    params = with_rows(key, params, config, start)
    scales = with_scales({"layers": {}}, config)["layers"]
    placed = {name: jax.device_put(scale, shardings["layers"][name]) for name, scale in scales.items()}
    return params | {"layers": params["layers"] | placed}


def exact_weight(config: Config, mesh: Mesh, path: str) -> jax.Array:
    """One frozen parameter (such as `layers/query`) as `init.checkpoint` has it, however the run keeps it.

    Raises:
        UserError: the weights of `init.checkpoint` cannot be read.
    """
    start = open_initial(config)
    if start is None:
        shardings = parameter_shardings(mesh, abstract_params(config.model, jnp.float32)[1])
        key = jax.random.key(config.seed)
        draw = jax.jit(lambda: at(init_params(key, config.model, jnp.float32), path), out_shardings=at(shardings, path))
        return draw()
    if isinstance(start.source, HfCheckpoint):
        chosen = tuple(parameter for parameter in start.source.parameters if parameter.path == path)
        source = dataclasses.replace(start.source, parameters=chosen)
        return at(read_parameters(source, mesh, source.dtype, config.model.padded_vocab_size), path)
    return _restored(config, start, mesh, path, start.source.train.param_dtype)


def _of_run(config: Config, start: Initial, mesh: Mesh) -> Any:
    """The weights of a run's checkpoint, one after the other."""
    tree: dict[str, Any] = {"layers": {}}
    for entries, names in jax.tree_util.tree_leaves_with_path(
        abstract_params(start.model, jnp.float32)[1], is_leaf=is_axes
    ):
        path = [entry.key for entry in entries]
        array = _restored(config, start, mesh, "/".join(path), frozen_dtype(config, names))
        keep = functools.partial(stored, config, names)
        node = tree if len(path) == 1 else tree[path[0]]
        node[path[-1]] = jax.jit(keep, out_shardings=array.sharding, donate_argnums=0)(array)
    return tree


def _restored(config: Config, start: Initial, mesh: Mesh, path: str, dtype: Any) -> jax.Array:
    """One parameter of a run's checkpoint."""
    model = dataclasses.replace(start.model, vocab_multiple=config.model.vocab_multiple)
    shapes, axes = abstract_params(model, jnp.float32)
    wanted = jax.ShapeDtypeStruct(at(shapes, path).shape, dtype, sharding=parameter_shardings(mesh, at(axes, path)))
    for name in reversed(path.split("/")):
        wanted = {name: wanted}
    return at(restore_params(start.directory / "checkpoints", wanted, config.init.step or None)[1], path)


def with_step(config: Config, start: Initial | None) -> Config:
    """The configuration with the step of the run to start from, where adapters will ask for it again."""
    if not config.lora.rank or start is None or isinstance(start.source, HfCheckpoint) or config.init.step:
        return config
    steps = saved_steps(start.directory / "checkpoints")
    return dataclasses.replace(config, init=dataclasses.replace(config.init, step=max(steps, default=0)))


def fingerprint(config: Config) -> str:
    """What tells the weights to start from apart from others: of a published model, the names, types, shapes and some
    bytes of its tensors; of a run, its configuration, its data and the step. Empty where they are random.

    Raises:
        UserError: `init.checkpoint` is gone, or cannot be read.
    """
    start, digest = open_initial(config), hashlib.sha256()
    if start is None:
        return ""
    if isinstance(start.source, HfCheckpoint):
        for name, tensor in sorted(start.source.tensors.items()):
            digest.update(f"{name} {tensor.type_name} {tensor.shape}".encode())
            digest.update(tensor.sample(SAMPLE))
    else:
        for name in ("config.json", "run.json"):
            digest.update((start.directory / name).read_bytes())
        digest.update(str(config.init.step).encode())
    return digest.hexdigest()
