# SPDX-License-Identifier: Apache-2.0
"""A finished or unfinished run, opened from its directory alone."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jepa_jax.checkpoint.manager import restore_params
from llm_jepa_jax.config import Config, freeze, load_json
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.transformer import abstract_params
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import parameter_shardings
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.text.tokenizer import Tokenizer, load_tokenizer

CONTENTS = "config.json, tokenizer.model and checkpoints/"


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with its tokenizer, on a mesh."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    step: int
    params: Any


def open_run(workdir: pathlib.Path, config: Config | None = None) -> Run:
    """Opens the newest checkpoint of a run directory; `config` (default: its own config.json) may name another mesh.

    Raises:
        UserError: the directory is not that of a run, or no checkpoint can be read.
    """
    for name in ("config.json", "tokenizer.model", "checkpoints"):
        if not (workdir / name).exists():
            raise UserError(f"{workdir}: has no {name}; a run directory holds {CONTENTS}")
    saved = freeze(load_json(workdir / "config.json"))
    config = config or saved
    config = dataclasses.replace(config, model=saved.model)  # its vocabulary size is known only there
    mesh = make_mesh(config.mesh)
    config = resolve(config, mesh.devices.shape)
    shapes, axes = abstract_params(config.model, jnp.dtype(config.train.param_dtype))
    abstract = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        parameter_shardings(mesh, axes),
    )
    step, params = restore_params(workdir / "checkpoints", abstract)
    return Run(config, mesh, load_tokenizer(workdir / "tokenizer.model"), step, params)
