# SPDX-License-Identifier: Apache-2.0
"""OpenELM (arXiv 2404.14619): every layer has its own number of heads and its own width of the MLP; fused matrices."""

import itertools
import math
from typing import Any

import numpy as np

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.models.families.family import Family
from llm_jepa_jax.models.families.fields import Fields
from llm_jepa_jax.models.families.parts import Activation, Fixed, Switch, Value

LAYER = "transformer.layers.{}"
STEPS = (0.5, 0.25, 0.1, 0.05, 0.01)
"""In which multipliers are looked for that give the heads of a model."""


def nearest(width: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to a width, at least one of it, and not below nine tenths of the width."""
    near = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * width else near


def spread(first: float, last: float, layers: int) -> list[float]:
    """Multipliers from the first layer's to the last one's in equal steps, to two decimals."""
    return [round(float(value), 2) for value in np.linspace(first, last, layers)]


def _by_layer(key: str, by_layer: str, sizes: list[int]) -> dict[str, Any]:
    """Our keys of a size that each layer has; `by_layer` only where layers differ."""
    return {key: max(sizes), by_layer: tuple(sizes) if len(set(sizes)) > 1 else ()}


class Heads:
    """Query heads of each layer, by multipliers of the model's width; key and value heads are in groups of them."""

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        layers, width, head_dim = known["num_layers"], known["embed_dim"], known["head_dim"]
        groups, multipliers = fields.take("num_gqa_groups", int, 1, null=0), fields.numbers("qkv_multipliers")
        if len(multipliers) > 2:
            raise fields.refuse("qkv_multipliers", multipliers, "it is a number, or the first and the last layer's")
        each = spread(*multipliers, layers) if len(multipliers) == 2 else multipliers * layers
        heads = [nearest(width * value, head_dim * (groups or 2)) // head_dim for value in each]
        found = {"num_query_heads": heads, "num_kv_heads": [number // (groups or 1) for number in heads]}
        for name, numbers in found.items():
            said = fields.take(name, list, numbers)
            if said != numbers:
                raise fields.refuse(name, said, f"`qkv_multipliers` and `num_gqa_groups` give {numbers}")
        keys = _by_layer("num_heads", "layer_heads", found["num_query_heads"])
        return keys | _by_layer("num_kv_heads", "layer_kv_heads", found["num_kv_heads"])

    def write(self, config: ModelConfig) -> dict[str, Any]:
        each = [config.layer(number) for number in range(config.num_layers)]
        heads, groups = [layer.num_heads for layer in each], each[0].num_heads // each[0].num_kv_heads
        return {
            "num_query_heads": heads,
            "num_kv_heads": [layer.num_kv_heads for layer in each],
            "num_gqa_groups": groups,
            "qkv_multipliers": _multipliers(heads, config.embed_dim, config.head_dim, groups),
        }


def _multipliers(heads: list[int], width: int, head_dim: int, groups: int) -> float | list[float]:
    """Multipliers that give these heads, the roundest; where none do, those of the first and last layer's heads."""
    ends = [heads[0] * head_dim / width, heads[-1] * head_dim / width]
    if len(set(heads)) == 1:
        return ends[0]

    def of(multiplier: float) -> int:
        return nearest(width * multiplier, head_dim * groups) // head_dim

    for step in STEPS:
        most = math.ceil((max(ends) + head_dim * groups / width) / step)
        values = [round(step * number, 2) for number in range(1, most + 1)]
        pairs = itertools.product(*([value for value in values if of(value) == heads[end]] for end in (0, -1)))
        for first, last in pairs:
            if [of(value) for value in spread(first, last, len(heads))] == heads:
                return [first, last]
    return ends


class Widths:
    """The width of each layer's MLP, by multipliers of the model's width."""

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        layers, width = known["num_layers"], known["embed_dim"]
        divisor, multipliers = fields.take("ffn_dim_divisor", int, 256), fields.numbers("ffn_multipliers")
        if len(multipliers) not in (1, 2, layers):
            right = f"it is a number, the first and the last layer's, or one for each of {layers} layers"
            raise fields.refuse("ffn_multipliers", f"{len(multipliers)} numbers", right)
        each = spread(*multipliers, layers) if len(multipliers) == 2 else multipliers
        widths = [nearest(width * value, divisor) for value in each] * (layers // len(each))
        return _by_layer("mlp_dim", "layer_mlp_dims", widths)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        widths = [config.layer(number).mlp_dim for number in range(config.num_layers)]
        multipliers = [width / config.embed_dim for width in widths]
        return {"ffn_dim_divisor": math.gcd(256, *widths), "ffn_multipliers": multipliers}


class PublishedCode:
    """Where `transformers`, which has no such class, finds one: in the published repository."""

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        classes = {"AutoConfig": "configuration_openelm.OpenELMConfig"}
        classes |= {"AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"}
        return {"auto_map": {name: f"apple/OpenELM-1_1B--{place}" for name, place in classes.items()}}


OPENELM = Family(
    model_type="openelm",
    architecture="OpenELMForCausalLM",
    parts=(
        Value("vocab_size", "vocab_size"),
        Value("model_dim", "embed_dim"),
        Value("head_dim", "head_dim"),
        Value("num_transformer_layers", "num_layers"),
        Heads(),
        Widths(),
        Value("max_context_length", "max_positions"),
        Value("initializer_range", "init_std", 0.02),
        Value("share_input_output_layers", "tie_embeddings", False),
        Value("ffn_with_glu", "mlp_gated", True),
        Value("rope_freq_constant", "rope_theta", 10000.0),
        Activation("activation_fn_name", "swish"),
        Switch("normalize_qk_projections", "qk_norm", on="head", off="none"),
        Fixed("normalization_layer_name", "rms_norm"),
        PublishedCode(),
    ),
    names={
        "embedding": "transformer.token_embeddings",
        "layers/attention_norm": f"{LAYER}.attn_norm",
        "layers/query": f"{LAYER}.attn.qkv_proj",
        "layers/key": f"{LAYER}.attn.qkv_proj",
        "layers/value": f"{LAYER}.attn.qkv_proj",
        "layers/query_norm": f"{LAYER}.attn.q_norm",
        "layers/key_norm": f"{LAYER}.attn.k_norm",
        "layers/out": f"{LAYER}.attn.out_proj",
        "layers/mlp_norm": f"{LAYER}.ffn_norm",
        "layers/gate": f"{LAYER}.ffn.proj_1",
        "layers/up": f"{LAYER}.ffn.proj_1",
        "layers/down": f"{LAYER}.ffn.proj_2",
        "final_norm": "transformer.norm",
        "head": "transformer.classifier",
    },
    fixed={"norm_eps": 1e-6},
    without_effect=("rope_max_length",),
)
