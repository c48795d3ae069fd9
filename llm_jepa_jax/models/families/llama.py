# SPDX-License-Identifier: Apache-2.0
"""Llama 2, 3, 3.1, 3.2 and 3.3, and models with their structure, such as SmolLM."""

from llm_jepa_jax.models.families.family import SEQUENTIAL, Family
from llm_jepa_jax.models.families.parts import SIZES, Activation, Flags, Rope, Value

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    parts=(
        *SIZES,
        Value("rms_norm_eps", "norm_eps", 1e-6),
        Value("tie_word_embeddings", "tie_embeddings", False),
        Activation(),
        Flags("attention_bias", ("qkv_bias", "out_bias")),
        Flags("mlp_bias", ("mlp_bias",)),
        Rope(),
    ),
    names=SEQUENTIAL,
)
