# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 (soft caps, every other layer with a window) and Gemma 3 text (norms of heads, two rotary bases, windows)."""

import dataclasses
from typing import Any

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.models.families.family import LAYER, SEQUENTIAL, Family
from llm_jepa_jax.models.families.fields import Fields
from llm_jepa_jax.models.families.parts import (
    SIZES,
    Activation,
    Fixed,
    Flags,
    LayerTypes,
    Part,
    Rope,
    SlidingWindow,
    Value,
)

_SHARED: tuple[Part, ...] = (
    *SIZES,
    Value("rms_norm_eps", "norm_eps", 1e-6),
    Value("tie_word_embeddings", "tie_embeddings", True),
    Activation("hidden_activation", "gelu_pytorch_tanh"),
    Flags("attention_bias", ("qkv_bias", "out_bias")),
    Value("query_pre_attn_scalar", "score_width", 256.0, written=int),
    Fixed("use_bidirectional_attention", False),
    SlidingWindow(),
)
_NAMES = SEQUENTIAL | {
    "layers/attention_post_norm": f"{LAYER}.post_attention_layernorm",
    "layers/mlp_norm": f"{LAYER}.pre_feedforward_layernorm",
    "layers/mlp_post_norm": f"{LAYER}.post_feedforward_layernorm",
}
_FIXED = {"norm": "rms_plus_one", "norm_placement": "both", "scale_embeddings": True}


@dataclasses.dataclass(frozen=True)
class TwoRopes:
    """Rotary settings of global layers and of those with a window, in either spelling; both are written."""

    theta: float
    local_theta: float

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        new = fields.below("rope_parameters")
        if "full_attention" not in new:
            local = fields.take("rope_local_base_freq", float, self.local_theta)
            new.finish()
            return Rope(self.theta).read(fields, known) | {"local_rope_theta": local}
        for name in ("rope_theta", "rope_local_base_freq", "rope_scaling"):
            fields.take(name, dict if name == "rope_scaling" else float, None)
        globally, locally = new.below("full_attention"), new.below("sliding_attention")
        new.finish()
        wide = Rope(self.theta).read(_only(fields, globally), known)
        near = Rope(self.local_theta).read(_only(fields, locally), known)
        if near["rope_scaling"].factor != 1.0:
            raise fields.refuse("rope_parameters", "scaled in windowed layers", "use a model whose are not")
        return wide | {"local_rope_theta": near["rope_theta"]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        values = Rope(self.theta).write(config)
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        values["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": local}
        return values | {"rope_local_base_freq": config.local_rope_theta}


def _only(fields: Fields, section: Fields) -> Fields:
    """A file whose rotary settings are that section."""
    return Fields(fields.place, {"rope_parameters": section.rest()})


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    parts=(
        *_SHARED,
        LayerTypes("LG"),
        Rope(),
        Value("final_logit_softcapping", "logit_soft_cap", 30.0, null=0.0),
        Value("attn_logit_softcapping", "attention_soft_cap", 50.0, null=0.0),
    ),
    names=_NAMES,
    fixed=_FIXED,
    without_effect=("hidden_act",),
)

GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    parts=(
        *_SHARED,
        LayerTypes("LLLLLG", period_fields=("sliding_window_pattern", "_sliding_window_pattern")),
        TwoRopes(1_000_000.0, 10_000.0),
        Value("final_logit_softcapping", "logit_soft_cap", 0.0, null=0.0),
        Value("attn_logit_softcapping", "attention_soft_cap", 0.0, null=0.0),
    ),
    names=_NAMES,
    fixed=_FIXED | {"qk_norm": "head"},
    without_effect=("hidden_act",),
)
