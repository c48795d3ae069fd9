# SPDX-License-Identifier: Apache-2.0
"""Mistral: Llama with a window in every layer, or in none."""

from llm_jepa_jax.models.families.family import SEQUENTIAL, Family
from llm_jepa_jax.models.families.parts import SIZES, Activation, Rope, SlidingWindow, Value

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    parts=(
        *SIZES,
        Value("rms_norm_eps", "norm_eps", 1e-6),
        Value("tie_word_embeddings", "tie_embeddings", False),
        Activation(),
        Rope(),
        SlidingWindow(),
    ),
    names=SEQUENTIAL,
)
