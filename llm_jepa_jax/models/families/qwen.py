# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 2.5 (biases on queries, keys and values; also DeepSeek-R1-Distill-Qwen) and Qwen 3 (norms of heads)."""

from llm_jepa_jax.models.families.family import SEQUENTIAL, Family
from llm_jepa_jax.models.families.parts import SIZES, Activation, Flags, LayerTypes, Part, Rope, SlidingWindow, Value

_SHARED: tuple[Part, ...] = (
    *SIZES,
    Value("rms_norm_eps", "norm_eps", 1e-6),
    Value("tie_word_embeddings", "tie_embeddings", False),
    Activation(),
    Rope(),
    SlidingWindow(switch="use_sliding_window"),
    LayerTypes(first_field="max_window_layers", first_default=28),
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    parts=_SHARED,
    names=SEQUENTIAL,
    fixed={"qkv_bias": True},
    without_effect=("use_mrope",),
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    parts=(*_SHARED, Flags("attention_bias", ("qkv_bias", "out_bias"))),
    names=SEQUENTIAL,
    fixed={"qk_norm": "head"},
)
