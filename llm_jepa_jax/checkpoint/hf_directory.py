# SPDX-License-Identifier: Apache-2.0
"""A published checkpoint's directory: its model, and where its tensors lie; all of it checked before one is read."""

import dataclasses
import json
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.checkpoint.hf_layout import Parameter, parameters
from llm_jepa_jax.checkpoint.places import Place, reason
from llm_jepa_jax.checkpoint.safetensors import TYPES, StoredTensor, read_header
from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.families.registry import read_model

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of older files that follow from `config.json`."""
SHOWN = 4
"""How many names an error lists."""


@dataclasses.dataclass(frozen=True)
class HfCheckpoint:
    """A checked directory."""

    directory: Place
    model: ModelConfig
    parameters: tuple[Parameter, ...]
    tensors: dict[str, StoredTensor]

    @property
    def dtype(self) -> str:
        """The narrowest type of ours that holds its weights: `bfloat16` if all are, else `float32`."""
        return "bfloat16" if {t.dtype for t in self.tensors.values()} == {np.dtype(jnp.bfloat16)} else "float32"


def is_published(directory: Place) -> bool:
    """Whether a directory holds a published model, rather than a run: its `config.json` names a `model_type`."""
    return (directory / CONFIG).is_file() and "model_type" in read_json(directory / CONFIG)


def open_directory(directory: Place) -> HfCheckpoint:
    """Reads `config.json`, the index and the header of every file; no tensor yet.

    Raises:
        UserError: a file is missing or damaged, the model is not supported, or tensors are missing, too many, or of
            another shape or type than the model needs.
    """
    place = directory / CONFIG
    family, model = read_model(str(place), read_json(place))
    found = _tensors(directory)
    wanted = tuple(parameters(family, model))
    shapes = {name: parameter.published_shape for parameter in wanted for name in parameter.names}
    head = family.tensor("head")
    tied = model.tie_embeddings and head in found
    unneeded = {name for name in found if COMPUTED.fullmatch(name) or (tied and name == head)}
    kept = {name: tensor for name, tensor in found.items() if name not in unneeded}
    _check(directory, shapes, kept)
    if tied:
        _check_tied(head, found[head], found[family.tensor("embedding")])
    return HfCheckpoint(directory, model, wanted, kept)


def read_json(path: Place) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is missing or holds none.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}; name the directory of a published model") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object; download it again")
    return values


def _tensors(directory: Place) -> dict[str, StoredTensor]:
    """All tensors of the one file, or of those of the index."""
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise UserError(
            f"{directory}: has no {SINGLE} and no {INDEX}; weights are read from safetensors files alone: "
            "convert others with transformers' save_pretrained"
        )
    places = read_json(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{directory / INDEX}: has no `weight_map` of tensor names to files; download it again")
    missing = sorted({file for file in places.values() if not (directory / file).is_file()})
    if missing:
        raise UserError(f"{directory}: the shards {_some(missing)} of {INDEX} are missing; download them")
    found = {file: read_header(directory / file) for file in sorted(set(places.values()))}
    absent = [f"{name} in {file}" for name, file in places.items() if name not in found[file]]
    if absent:
        raise UserError(f"{directory / INDEX}: names tensors that are not there: {_some(absent)}; download it again")
    unnamed = [name for file, tensors in found.items() for name in tensors if places.get(name) != file]
    if unnamed:
        raise UserError(f"{directory / INDEX}: does not name tensors that are there: {_some(unnamed)}")
    return {name: found[file][name] for name, file in places.items()}


def _check(directory: Place, shapes: dict[str, tuple[int, ...]], found: dict[str, StoredTensor]) -> None:
    """The tensors found are those wanted, in shape and type."""
    misshapen = [
        f"{name} {list(found[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    mistyped = [f"{name} {t.type_name}" for name, t in found.items() if name in shapes and t.type_name not in TYPES]
    problems = {
        "missing": [name for name in shapes if name not in found],
        "too many": [name for name in found if name not in shapes],
        "of another shape": misshapen,
        f"not of type {', '.join(TYPES)}": mistyped,
    }
    said = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if said:
        raise UserError(f"{directory}: tensors are not those of its {CONFIG}; {'; '.join(said)}")


def _check_tied(name: str, head: StoredTensor, embedding: StoredTensor) -> None:
    """A head that is stored though it is tied must be the embedding."""
    rows = 4096
    same = head.shape == embedding.shape and head.type_name == embedding.type_name
    for start in range(0, head.shape[0] if same else 0, rows):
        part = (slice(start, start + rows),)
        same = same and np.array_equal(head.read(part), embedding.read(part))
    if not same:
        raise UserError(
            f"{head.path}: {name} is not the embedding, though {CONFIG} ties them; set tie_word_embeddings to false"
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
