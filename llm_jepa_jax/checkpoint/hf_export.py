# SPDX-License-Identifier: Apache-2.0
"""A model as a directory that Hugging Face's libraries and their descendants read, written tensor by tensor."""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jepa_jax.checkpoint.hf_directory import CONFIG, INDEX, SINGLE, read_json
from llm_jepa_jax.checkpoint.hf_layout import LAYERS, Parameter, at, parameters
from llm_jepa_jax.checkpoint.safetensors import Writer
from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS
from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.families.registry import family_of
from llm_jepa_jax.models.lora import merged_layer
from llm_jepa_jax.models.ops import adapter_names
from llm_jepa_jax.models.quantized import Quantized
from llm_jepa_jax.parallel.sharding import replicated

GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """How a model is written."""

    dtype: str = ""
    """`float32`, `bfloat16` or `float16`; empty: that of the parameters."""
    shard_bytes: int = SHARD_BYTES
    """The most that a file of several tensors holds."""
    num_tokens: int = 0
    """Rows of the vocabulary to keep, from the first; 0: all."""
    source: pathlib.Path | None = None
    """The published directory that the model comes from, whose token ids and generation settings are kept."""
    tokenizer_files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """By name, written as they are."""


def export(
    params: Any,
    config: ModelConfig,
    mesh: Mesh,
    directory: pathlib.Path,
    settings: ExportSettings,
    exact: Callable[[str], jax.Array] | None = None,
) -> int:
    """Writes `config.json`, `generation_config.json` and the weights; returns the number of weight files.

    Adapters are added to their weights, which are `exact(path)` where `params` has them quantised. Every process takes
    part, and the first one writes. One tensor at a time is whole on the devices and on the host.

    Raises:
        UserError: no family can say this model, or the directory is not new.
    """
    dtype = jnp.dtype(settings.dtype or params["embedding"].dtype)
    size = settings.num_tokens or config.vocab_size
    if not 0 < size <= config.vocab_size:
        raise UserError(f"num_tokens={size} is not in the vocabulary; use 1 to {config.vocab_size}")
    config = dataclasses.replace(config, vocab_size=size)
    family = family_of(config)
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: is not empty; name a new directory")
    wanted = list(parameters(family, config))
    files = _files(wanted, dtype.itemsize, settings.shard_bytes)
    part = directory.with_name(directory.name + ".part")
    if jax.process_index() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, data in settings.tokenizer_files.items():
            (part / name).write_bytes(data)
        _write_configs(part, family.write(config), dtype.name, settings.source)
    _write_weights(params, wanted, mesh, part, files, dtype, exact)
    if jax.process_index() == 0:
        if directory.exists():
            directory.rmdir()
        part.rename(directory)
    return len(files)


def _files(wanted: list[Parameter], width: int, most: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Which tensors, with their shapes, go into which file."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for parameter in wanted:
        for name in parameter.names:
            size = width * math.prod(parameter.published_shape)
            if groups[-1] and held + size > most:
                groups.append({})
                held = 0
            groups[-1][name] = parameter.published_shape
            held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_weights(
    params: Any, wanted: list[Parameter], mesh: Mesh, part: pathlib.Path, files: Any, dtype: np.dtype, exact: Any
) -> None:
    writes = jax.process_index() == 0
    place = {name: file for file, group in files.items() for name in group}
    writer: Writer | None = None
    for parameter in wanted:
        for name, array in _tensors(params, parameter, mesh, exact):
            if not writes:
                continue
            if writer is None or writer.path.name != place[name]:
                if writer:
                    writer.close()
                writer = Writer(part / place[name], files[place[name]], dtype)
            writer.add(name, parameter.to_published(array))
    if writer:
        writer.close()
    if writes and len(files) > 1:
        total = sum(math.prod(shape) for group in files.values() for shape in group.values()) * dtype.itemsize
        _write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": place})


def _tensors(params: Any, parameter: Parameter, mesh: Mesh, exact: Any) -> Any:
    """The name and the whole array of each tensor of a parameter."""
    whole, leaf = replicated(mesh), at(params, parameter.path)
    if not parameter.num_layers:
        axis = VOCABULARY_AXIS.get(parameter.path, 0)
        cut = jax.jit(lambda x: jax.lax.slice_in_dim(x, 0, parameter.shape[axis], axis=axis), out_shardings=whole)
        yield parameter.name, np.asarray(cut(leaf).addressable_data(0))
        return
    path = parameter.path.removeprefix(LAYERS)
    layers = {name: params["layers"][name] for name in (path, *adapter_names(path)) if name in params["layers"]}
    if isinstance(leaf, Quantized):
        layers[path] = exact(parameter.path)
    take = jax.jit(lambda layers, i: merged_layer(layers, path, i), out_shardings=whole)
    for number, name in enumerate(parameter.names):
        yield name, np.asarray(take(layers, number).addressable_data(0))


def _write_configs(part: pathlib.Path, values: dict[str, Any], dtype: str, source: pathlib.Path | None) -> None:
    values |= {"dtype": dtype, "torch_dtype": dtype, "use_cache": True}
    generation: dict[str, Any] = {}
    if source and (source / CONFIG).is_file():
        ids = read_json(source / CONFIG)
        generation = {name: ids[name] for name in TOKEN_IDS if ids.get(name) is not None}
        values |= generation
        if (source / GENERATION).is_file():
            generation = read_json(source / GENERATION)
    _write_json(part / CONFIG, values)
    _write_json(part / GENERATION, generation)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
