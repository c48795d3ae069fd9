# SPDX-License-Identifier: Apache-2.0
"""A model as a directory that Hugging Face's libraries and their descendants read, written tensor by tensor."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jepa_jax.checkpoint.companions import GENERATION
from llm_jepa_jax.checkpoint.export_settings import ExportSettings
from llm_jepa_jax.checkpoint.hf_directory import CONFIG, INDEX, SINGLE
from llm_jepa_jax.checkpoint.hf_layout import LAYERS, Parameter, at, by_tensor, parameters
from llm_jepa_jax.checkpoint.places import Place, is_url
from llm_jepa_jax.checkpoint.safetensors import Writer
from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS
from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.families.registry import family_of
from llm_jepa_jax.models.lora import merged_layer
from llm_jepa_jax.models.ops import adapter_names
from llm_jepa_jax.models.quantized import Quantized
from llm_jepa_jax.parallel.processes import wait_for_all
from llm_jepa_jax.parallel.sharding import replicated


def export(
    params: Any,
    config: ModelConfig,
    mesh: Mesh,
    directory: Place,
    settings: ExportSettings,
    exact: Callable[[str], jax.Array] | None = None,
) -> int:
    """Writes `config.json`, the weights and `settings.files`; returns the number of weight files.

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
    wanted = by_tensor(parameters(family, config))
    files = _files(wanted, dtype.itemsize, settings.shard_bytes)
    # A store cannot rename directories; what is torn there has no index, or lacks shards.
    part = directory if is_url(directory) else directory.with_name(directory.name + ".part")
    if jax.process_index() == 0:
        if not is_url(directory):
            shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, exist_ok=True)
        values = family.write(config) | {"dtype": dtype.name, "torch_dtype": dtype.name, "use_cache": True}
        _write_json(part / CONFIG, values | settings.token_ids)
        _write_json(part / GENERATION, settings.token_ids)
        for name, data in settings.files.items():
            (part / name).write_bytes(data)
    _write_weights(params, wanted, mesh, part, files, dtype, exact)
    if jax.process_index() == 0 and part != directory:
        if directory.exists():
            directory.rmdir()
        part.rename(directory)
    wait_for_all("exported")
    return len(files)


def _files(wanted: list[list[Parameter]], width: int, most: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Which tensors, with their shapes, go into which file."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for parameter, *_ in wanted:
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
    params: Any, wanted: list[list[Parameter]], mesh: Mesh, part: Place, files: Any, dtype: np.dtype, exact: Any
) -> None:
    writes = jax.process_index() == 0
    place = {name: file for file, group in files.items() for name in group}
    writer: Writer | None = None
    for group in wanted:
        for name, array in _tensors(params, group, mesh, exact):
            if not writes:
                continue
            if writer is None or writer.path.name != place[name]:
                if writer:
                    writer.close()
                writer = Writer(part / place[name], files[place[name]], dtype)
            writer.add(name, array)
    if writer:
        writer.close()
    if writes and len(files) > 1:
        total = sum(math.prod(shape) for group in files.values() for shape in group.values()) * dtype.itemsize
        _write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": place})


def _tensors(params: Any, group: list[Parameter], mesh: Mesh, exact: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the whole array of each tensor that holds these parameters."""
    parts = [_parts(params, parameter, mesh, exact) for parameter in group]
    for name, *arrays in zip(group[0].names, *parts, strict=True):
        yield name, arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _parts(params: Any, parameter: Parameter, mesh: Mesh, exact: Any) -> Iterator[np.ndarray]:
    """What a parameter puts into each of its tensors."""
    whole, leaf = replicated(mesh), at(params, parameter.path)
    if not parameter.num_layers:
        axis = VOCABULARY_AXIS.get(parameter.path, 0)
        cut = jax.jit(lambda x: jax.lax.slice_in_dim(x, 0, parameter.shape[axis], axis=axis), out_shardings=whole)
        yield parameter.to_published(np.asarray(cut(leaf).addressable_data(0)))
        return
    path = parameter.path.removeprefix(LAYERS)
    layers = {name: params["layers"][name] for name in (path, *adapter_names(path)) if name in params["layers"]}
    if isinstance(leaf, Quantized):
        layers[path] = exact(parameter.path)
    take = jax.jit(lambda layers, i: merged_layer(layers, path, i), out_shardings=whole)
    for number in range(parameter.num_layers):
        yield parameter.to_published(np.asarray(take(layers, number).addressable_data(0)))


def _write_json(path: Place, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
