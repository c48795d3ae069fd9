# SPDX-License-Identifier: Apache-2.0
"""OLMo 2 (norms on what attention and MLP give, and of all queries and all keys together) and OLMo 3 (windows)."""

from llm_jepa_jax.models.families.family import LAYER, SEQUENTIAL, Family
from llm_jepa_jax.models.families.parts import (
    SIZES,
    Activation,
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
    Value("rms_norm_eps", "norm_eps", 1e-5),
    Value("tie_word_embeddings", "tie_embeddings", False),
    Activation(),
    Flags("attention_bias", ("qkv_bias", "out_bias")),
)
_NAMES = SEQUENTIAL | {
    "layers/attention_post_norm": f"{LAYER}.post_attention_layernorm",
    "layers/mlp_post_norm": f"{LAYER}.post_feedforward_layernorm",
}
_FIXED = {"norm_placement": "post", "qk_norm": "full"}

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    parts=(*_SHARED, Rope()),
    names=_NAMES,
    fixed=_FIXED,
)

OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    parts=(*_SHARED, SlidingWindow(), LayerTypes("LLLG"), TwoRopes(500_000.0)),
    names=_NAMES,
    fixed=_FIXED,
)
