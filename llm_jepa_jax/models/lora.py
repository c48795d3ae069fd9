# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314), as trees of parameters.

Beside a weight `layers/X [N, *In, *Out]` lie `X_lora_a [N, *In, r]` and `X_lora_b [N, r, *Out]`, which are trained, and
`X_lora_scale [N]`, which is not. What reads a model's parameters takes the two trees joined, and needs no other word.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jepa_jax.config import Config
from llm_jepa_jax.models.ops import adapter_names
from llm_jepa_jax.models.quantized import Quantized, quantize, whole
from llm_jepa_jax.models.transformer import abstract_params
from llm_jepa_jax.parallel.sharding import is_axes
from llm_jepa_jax.resolve_lora import adapter_targets

Axes = tuple[str, ...]
SCALE_DTYPE = jnp.float32


def num_inputs(axes: Axes) -> int:
    """How many axes of one layer's matrix are contracted, by their names: the model's width comes in, or goes out."""
    return 1 if axes[0] == "embed" else len(axes) - 1


def joined(params: Any, frozen: Any) -> Any:
    """The whole tree, from what is trained and what is not (None: nothing)."""
    if frozen is None:
        return params
    return frozen | params | {"layers": frozen["layers"] | params["layers"]}


def abstract_adapters(config: Config) -> tuple[Any, Any]:
    """What is trained of the model: `jax.ShapeDtypeStruct`s, and the logical axes of each."""
    shapes, axes, rank = *abstract_params(config.model, config.train.param_dtype), config.lora.rank
    made, made_axes = {}, {}
    for target in adapter_targets(config.lora, config.model):
        weight, (layers, *names) = shapes["layers"][target], axes["layers"][target]
        cut = 1 + num_inputs(tuple(names))
        a, b, _ = adapter_names(target)
        made[a] = jax.ShapeDtypeStruct((*weight.shape[:cut], rank), weight.dtype)
        made[b] = jax.ShapeDtypeStruct((weight.shape[0], rank, *weight.shape[cut:]), weight.dtype)
        made_axes[a] = (layers, *names[: cut - 1], "rank")
        made_axes[b] = (layers, "rank", *names[cut - 1 :])
    return {"layers": made}, {"layers": made_axes}


def merged_layer(layers: Any, name: str, number: Any) -> jax.Array:
    """One layer's weight with what its adapter adds, if it has one: W + scale · A B, float32 then."""
    weight = jax.tree.map(lambda all_: jax.lax.dynamic_index_in_dim(all_, number, keepdims=False), layers[name])
    names = adapter_names(name)
    if names[0] not in layers:
        return weight
    a, b, scale = (jax.lax.dynamic_index_in_dim(layers[part], number, keepdims=False) for part in names)
    added = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision="highest")
    return whole(weight, jnp.float32) + scale * added


def merged(params: Any) -> Any:
    """The parameters of the model that weights and adapters together are, in float32 where there is an adapter."""
    layers = params["layers"]
    names = {name: adapter_names(name) for name in layers if adapter_names(name)[0] in layers}
    others = {name: value for name, value in layers.items() if name not in {n for each in names.values() for n in each}}

    def whole_stack(name: str) -> jax.Array:
        depth = layers[names[name][0]].shape[0]
        return jax.vmap(lambda number: merged_layer(layers, name, number))(jnp.arange(depth))

    return params | {"layers": others | {name: whole_stack(name) for name in names}}


def init_adapters(key: jax.Array, config: Config) -> Any:
    """As PEFT starts them: A uniform up to 1 / sqrt(inputs) (Kaiming's with slope sqrt(5)), and B zero."""
    shapes, layers = abstract_adapters(config)[0]["layers"], {}
    for number, target in enumerate(adapter_targets(config.lora, config.model)):
        a, b, _ = adapter_names(target)
        bound = math.prod(shapes[a].shape[1:-1]) ** -0.5
        drawn = jax.random.fold_in(key, number)
        layers[a] = jax.random.uniform(drawn, shapes[a].shape, shapes[a].dtype, -bound, bound)
        layers[b] = jnp.zeros(shapes[b].shape, shapes[b].dtype)
    return {"layers": layers}


def is_quantized(config: Config, axes: Axes) -> bool:
    """Whether a frozen parameter is kept in codes: the matrices of blocks are."""
    return config.lora.is_quantized and axes[0] == "layers" and "embed" in axes


def frozen_dtype(config: Config, axes: Axes) -> jnp.dtype:
    """The type that a frozen parameter is kept in, or quantised from."""
    if {"norm", "bias"} & set(axes):
        return jnp.dtype(config.train.param_dtype)
    if is_quantized(config, axes):
        return jnp.dtype(jnp.float32)
    return jnp.dtype(config.train.dtype if config.lora.is_quantized else config.lora.base_dtype or config.train.dtype)


def stored(config: Config, axes: Axes, array: jax.Array) -> Any:
    """A frozen parameter as it is kept; `array` is all of it, or that of one layer."""
    if not is_quantized(config, axes):
        return array.astype(frozen_dtype(config, axes))
    of_layer = axes[1:]
    axis = num_inputs(of_layer) - 1 + array.ndim - len(of_layer)
    return quantize(array, config.lora.base_dtype, axis, config.lora.tile_size)


def stored_axes(config: Config, axes: Axes) -> Any:
    """The logical axes of a frozen parameter as it is kept."""
    return Quantized(axes, axes) if is_quantized(config, axes) else axes


def frozen_from(params: Any, config: Config) -> Any:
    """The frozen tree of a model's parameters."""
    axes = abstract_params(config.model, jnp.float32)[1]
    kept = jax.tree.map(lambda names, array: stored(config, names, array), axes, params, is_leaf=is_axes)
    return with_scales(kept, config)


def with_scales(frozen: Any, config: Config) -> Any:
    """The frozen tree with the scales of adapters."""
    names = [adapter_names(target)[2] for target in adapter_targets(config.lora, config.model)]
    scales = {name: jnp.full((config.model.num_layers,), config.lora.scale, SCALE_DTYPE) for name in names}
    return frozen | {"layers": frozen["layers"] | scales}


def abstract_frozen(config: Config) -> tuple[Any, Any]:
    """What is not trained: `jax.ShapeDtypeStruct`s as they are kept, and each one's logical axes; None without LoRA."""
    if not config.lora.rank:
        return None, None
    shapes, axes = abstract_params(config.model, jnp.float32)
    kept = jax.eval_shape(lambda params: frozen_from(params, config), shapes)
    kept_axes = jax.tree.map(lambda names: stored_axes(config, names), axes, is_leaf=is_axes)
    scales = {name: ("layers",) for name in kept["layers"] if name not in kept_axes["layers"]}
    return kept, kept_axes | {"layers": kept_axes["layers"] | scales}
