# SPDX-License-Identifier: Apache-2.0
"""Adapters as the library PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`, in and out."""

import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jepa_jax.checkpoint.hf_directory import SHOWN, read_json
from llm_jepa_jax.checkpoint.hf_layout import Parameter, parameters
from llm_jepa_jax.checkpoint.safetensors import TYPES, StoredTensor, Writer, read_header
from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS
from llm_jepa_jax.config import Config, ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.lora_config import LINEAR_LAYERS, LoraConfig
from llm_jepa_jax.models.families.registry import family_of
from llm_jepa_jax.models.ops import adapter_names
from llm_jepa_jax.parallel.sharding import replicated
from llm_jepa_jax.resolve_lora import adapter_targets

SETTINGS, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "init_lora_weights"}
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
"""Fields that say nothing beyond what the tensors' names and shapes do."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways of starting adapters that leave the base as it was."""
TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """A checked directory."""

    directory: pathlib.Path
    lora: LoraConfig
    """What it says of itself: rank, alpha, dropout, targets."""
    layers: dict[str, tuple[Parameter, list[StoredTensor], list[StoredTensor]]]
    """By target: its weight, and A and B of every layer."""


def with_adapter(config: Config, model: ModelConfig) -> Config:
    """The configuration with the keys of `lora` that its `lora.adapter` settles, where they are at their defaults.

    Raises:
        UserError: the adapter cannot be read, or a key is set to another value than it has.
    """
    lora, default = config.lora, LoraConfig()
    if not lora.adapter:
        return config
    if not config.init.checkpoint:
        raise UserError(f"config: `lora.adapter`={lora.adapter} needs its base; set `init.checkpoint`")
    theirs = open_adapter(pathlib.Path(lora.adapter), model).lora
    values = {}
    for name in ("rank", "alpha", "rslora", "targets"):
        value, found = getattr(lora, name), getattr(theirs, name)
        same = value == found or (name == "targets" and set(value.split(",")) == set(found.split(",")))
        if value != getattr(default, name) and not same:
            raise UserError(f"config: `lora.{name}`={value} is not the {found} of `lora.adapter`; leave it out")
        values[name] = found
    return dataclasses.replace(config, lora=dataclasses.replace(lora, **values))


def open_adapter(directory: pathlib.Path, model: ModelConfig) -> PeftAdapter:
    """Reads the settings and the header of the weights; no tensor yet.

    Raises:
        UserError: a file is missing or damaged, a feature is not supported, or it is for another model.
    """
    place = directory / SETTINGS
    settings = read_json(place)
    _check_settings(place, settings)
    rank = settings.get("r")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{place}: `r` is {rank!r}; it must be a positive number")
    found = read_header(directory / WEIGHTS)
    parts: dict[tuple[str, str], StoredTensor] = {}
    for name, tensor in found.items():
        match = TENSOR.fullmatch(name.removeprefix(PREFIX))
        if not match or tensor.type_name not in TYPES:
            raise UserError(f"{directory / WEIGHTS}: `{name}` ({tensor.type_name}) is no adapter of a linear layer")
        parts[match["module"], match["part"]] = tensor
    layers = {}
    for target, weight in _weights(model).items():
        pairs = [[parts.pop((module, part), None) for module in _modules(weight)] for part in "AB"]
        if any(any(tensors) for tensors in pairs):
            layers[target] = (weight, *_checked(directory, weight, rank, pairs))
    if parts or not layers:
        names = ", ".join(module for module, _ in list(parts)[:SHOWN]) or "no adapter at all"
        raise UserError(f"{directory / WEIGHTS}: has {names}, which is not of this model; name the adapter of its base")
    lora = LoraConfig(
        rank, float(settings.get("lora_alpha", 8)), bool(settings.get("use_rslora")),
        float(settings.get("lora_dropout") or 0.0), ",".join(layers),
    )  # fmt: skip
    return PeftAdapter(directory, lora, layers)


def _check_settings(place: pathlib.Path, settings: dict[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{place}: `peft_type` is {settings.get('peft_type')!r}; only LORA is supported")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{place}: `bias` is {settings['bias']!r}, which is not supported; only none is")
    start = settings.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise UserError(
            f"{place}: `init_lora_weights` is {start!r}, which changes the base; convert the adapter to a plain one"
        )
    for name, value in settings.items():
        if value and name not in READ | WITHOUT_EFFECT:
            raise UserError(f"{place}: `{name}` is {value!r}, which is not supported; use an adapter without it")


def _weights(model: ModelConfig) -> dict[str, Parameter]:
    """The linear layers of blocks that a family publishes one by one."""
    every = [p for p in parameters(family_of(model), model) if p.num_layers and p.num_rows == p.own_shape[0]]
    named = {parameter.path.removeprefix("layers/"): parameter for parameter in every}
    return {name: named[name] for name in LINEAR_LAYERS if name in named}


def _modules(weight: Parameter) -> list[str]:
    """Published names of a weight's layers, such as `model.layers.0.self_attn.q_proj`."""
    return [name.removesuffix(".weight") for name in weight.names]


def _shapes(weight: Parameter, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Published shapes of A and B of one layer."""
    outputs, inputs = weight.published_shape
    return (rank, inputs), (outputs, rank)


def _checked(
    directory: pathlib.Path, weight: Parameter, rank: int, pairs: list[list[StoredTensor | None]]
) -> tuple[list[StoredTensor], list[StoredTensor]]:
    """A and B of every layer, all there and of their shapes."""
    for tensors, shape, part in zip(pairs, _shapes(weight, rank), "AB", strict=True):
        for tensor, module in zip(tensors, _modules(weight), strict=True):
            if tensor is None or tensor.shape != shape:
                what = f"is {list(tensor.shape)}, not {list(shape)}" if tensor else "is missing"
                raise UserError(
                    f"{directory / WEIGHTS}: lora_{part} of {module} {what}; every layer has an adapter of one rank"
                )
    return pairs[0], pairs[1]  # type: ignore[return-value]


def read_adapter(adapter: PeftAdapter, abstract: Any) -> Any:
    """The trained tree of an adapter, in the types and shardings of `abstract`."""
    layers = {}
    for target, (weight, *pair) in adapter.layers.items():
        shapes = _our_shapes(weight, adapter.lora.rank)
        for name, tensors, shape in zip(adapter_names(target), pair, shapes, strict=False):
            leaf = abstract["layers"][name]
            stacked = np.stack([tensor.read().T.reshape(shape) for tensor in tensors]).astype(leaf.dtype)
            layers[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, stacked.__getitem__)
    return {"layers": layers}


def _our_shapes(weight: Parameter, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B of one layer here."""
    count = weight.num_inputs
    return (*weight.shape[:count], rank), (rank, *weight.shape[count:])


def write_adapter(params: Any, config: Config, mesh: Mesh, directory: pathlib.Path, base: str, known: int) -> int:
    """Writes the adapters of `params`, joined or not, as PEFT loads them; returns the number of weight files.

    `base` is what they lie beside, by its name or directory. It knows the first `known` tokens: with more, the
    embedding and an untied head are written whole, as PEFT does where they were resized, and the base must be resized
    before the adapter is loaded. Every process takes part, and the first one writes.

    Raises:
        UserError: the directory is not new, or the family publishes an adapted matrix in one tensor with others.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: is not empty; name a new directory")
    lora, weights = config.lora, _weights(config.model)
    fused = [target for target in adapter_targets(lora, config.model) if target not in weights]
    if fused:
        raise UserError(
            f"--format=peft: family {config.model.family} publishes {', '.join(fused)} in one tensor with others, "
            "which PEFT would adapt together; use --format=merged"
        )
    shapes, sources = {}, {}
    for target in adapter_targets(lora, config.model):
        for module, layer in zip(_modules(weights[target]), range(config.model.num_layers), strict=True):
            for part, name, shape in zip(
                "AB", adapter_names(target), _shapes(weights[target], lora.rank), strict=False
            ):
                tensor = f"{PREFIX}{module}.lora_{part}.weight"
                shapes[tensor], sources[tensor] = shape, (name, layer)
    if config.model.vocab_size > known:
        for parameter in parameters(family_of(config.model), config.model):
            if parameter.path in VOCABULARY_AXIS:
                tensor = f"{PREFIX}{parameter.name}"
                shapes[tensor], sources[tensor] = parameter.published_shape, (parameter.path, None)
    writes, part = jax.process_index() == 0, directory.with_name(directory.name + ".part")
    if writes:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / SETTINGS).write_text(json.dumps(_settings(config, base, weights), indent=2) + "\n")
        writer = Writer(part / WEIGHTS, shapes, np.dtype(np.float32))
    whole = jax.jit(lambda array: array.astype(jnp.float32), out_shardings=replicated(mesh))
    one = jax.jit(lambda arrays, i: jax.lax.dynamic_index_in_dim(arrays, i, keepdims=False))
    for tensor, (name, layer) in sources.items():
        leaf = params[name] if layer is None else one(params["layers"][name], layer)
        array = np.asarray(whole(leaf).addressable_data(0))
        if layer is None:  # padding of the vocabulary is not published
            array = array.take(np.arange(config.model.vocab_size), axis=VOCABULARY_AXIS[name])
        if writes:
            writer.add(tensor, array if name == "embedding" else array.reshape(shapes[tensor][::-1]).T)
    if writes:
        writer.close()
        if directory.exists():
            directory.rmdir()
        part.rename(directory)
    return 1


def _settings(config: Config, base: str, weights: dict[str, Parameter]) -> dict[str, Any]:
    lora, chosen = config.lora, adapter_targets(config.lora, config.model)
    targets = [_modules(weights[name])[0].rpartition(".")[2] for name in chosen]
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }
