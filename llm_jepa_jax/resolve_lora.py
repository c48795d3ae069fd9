# SPDX-License-Identifier: Apache-2.0
"""Cross-field checks of the section `lora`."""

import dataclasses
import math
from collections.abc import Mapping

from llm_jepa_jax.config import Config, ModelConfig
from llm_jepa_jax.lora_config import LINEAR_LAYERS, LoraConfig
from llm_jepa_jax.model_checks import fail


def adapter_targets(lora: LoraConfig, model: ModelConfig) -> tuple[str, ...]:
    """The linear layers with adapters, in the order of a block.

    Raises:
        UserError: a name is none of this model's linear layers, or is there twice.
    """
    known = tuple(name for name in LINEAR_LAYERS if name != "gate" or model.mlp_gated)
    names = [name.strip() for name in lora.targets.split(",")] if lora.targets else list(known)
    for name in names:
        if name not in known:
            fail(
                "lora.targets",
                lora.targets,
                f"names {name!r}, which this model has not; use some of {', '.join(known)}",
            )
        if names.count(name) > 1:
            fail("lora.targets", lora.targets, f"names {name!r} twice; name it once")
    return tuple(name for name in known if name in names)


def check_lora(config: Config, mesh_shape: Mapping[str, int]) -> None:
    """Checks the section for a mesh of these sizes by axis (left out: 1).

    Raises:
        UserError: a contradiction, with the key, its value and the fix.
    """
    lora, default = config.lora, LoraConfig()
    if lora.rank < 0:
        fail("lora.rank", lora.rank, "must not be negative; use 0 for no adapters")
    if not lora.rank:
        for field in dataclasses.fields(lora):
            value = getattr(lora, field.name)
            if value != getattr(default, field.name):
                fail(f"lora.{field.name}", value, "has no effect with `lora.rank`=0; set the rank, or leave it out")
        return
    if not config.model.uniform:
        fail(
            "lora.rank",
            lora.rank,
            "is for models whose layers are all alike, and these differ; use 0: all weights train",
        )
    if lora.alpha <= 0:
        fail("lora.alpha", lora.alpha, "must be above 0")
    if not 0 <= lora.dropout < 1:
        fail("lora.dropout", lora.dropout, "must be 0 or more and below 1")
    adapter_targets(lora, config.model)
    if not lora.is_quantized and lora.tile_size != default.tile_size:
        fail("lora.tile_size", lora.tile_size, "has no effect unless `lora.base_dtype` is int8 or nf4; leave it out")
    if lora.base_dtype == "nf4" and (lora.tile_size % 2 or lora.tile_size < 4):
        fail(
            "lora.tile_size", lora.tile_size, "is odd or below 4, and `lora.base_dtype`=nf4 puts two weights in a byte"
        )
    if lora.is_quantized:
        _check_tiles(lora.tile_size, config.model, mesh_shape)


def _check_tiles(tile: int, model: ModelConfig, mesh_shape: Mapping[str, int]) -> None:
    """Tiles divide every linear layer's inputs, and no tile is cut by the mesh."""
    if tile <= 0:
        fail("lora.tile_size", tile, "must be above 0")
    stored = mesh_shape.get("fsdp", 1) * mesh_shape.get("context", 1)
    inputs = {"embed_dim": stored, "head_dim": 1, "mlp_dim": mesh_shape.get("tensor", 1)}
    for name, shards in inputs.items():
        size = getattr(model, name)
        if size % (tile * shards):
            most = math.gcd(*(getattr(model, other) // count for other, count in inputs.items()))
            cut = f" over {shards} devices" if shards > 1 else ""
            fail("lora.tile_size", tile, f"does not divide `model.{name}`={size}{cut}; use a divisor of {most}")
