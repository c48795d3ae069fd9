# SPDX-License-Identifier: Apache-2.0
"""Mistral (Llama with a window in every layer, or in none) and Ministral (a window in some)."""

from llm_jepa_jax.models.families.family import SEQUENTIAL, Family
from llm_jepa_jax.models.families.parts import SIZES, Activation, LayerTypes, Part, Rope, SlidingWindow, Value

_SHARED: tuple[Part, ...] = (
    *SIZES,
    Value("rms_norm_eps", "norm_eps", 1e-6),
    Value("tie_word_embeddings", "tie_embeddings", False),
    Activation(),
    Rope(),
    SlidingWindow(),
)

MISTRAL = Family(model_type="mistral", architecture="MistralForCausalLM", parts=_SHARED, names=SEQUENTIAL)

MINISTRAL = Family(
    model_type="ministral", architecture="MinistralForCausalLM", parts=(*_SHARED, LayerTypes()), names=SEQUENTIAL
)
