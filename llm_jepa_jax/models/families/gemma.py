# SPDX-License-Identifier: Apache-2.0
"""Gemma (GeGLU, scaled embeddings), Gemma 2 (soft caps, every other layer with a window) and Gemma 3 text (norms of
heads, two rotary bases, windows)."""

from llm_jepa_jax.models.families.family import LAYER, SEQUENTIAL, Family
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
from llm_jepa_jax.models.families.two_ropes import TwoRopes

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
_GELU = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""The first Gemma's releases say `gelu` and mean the approximation."""
_FIXED = {"norm": "rms_plus_one", "norm_placement": "both", "scale_embeddings": True}


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    parts=(
        *SIZES,
        Value("rms_norm_eps", "norm_eps", 1e-6),
        Value("tie_word_embeddings", "tie_embeddings", True),
        Fixed("hidden_activation", "gelu_pytorch_tanh"),
        Activation(default="gelu_pytorch_tanh", known=_GELU),
        Flags("attention_bias", ("qkv_bias", "out_bias")),
        Fixed("use_bidirectional_attention", False),
        Rope(),
    ),
    names=SEQUENTIAL,
    fixed={"norm": "rms_plus_one", "scale_embeddings": True},
)

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
