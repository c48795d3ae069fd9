# SPDX-License-Identifier: Apache-2.0
"""StableLM 3B and StableLM 2 1.6B: Llama with LayerNorm and part of each head rotated."""

from llm_jepa_jax.models.families.family import SEQUENTIAL, Family
from llm_jepa_jax.models.families.parts import SIZES, Activation, Fixed, Flags, HeadDim, Rope, Value

STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    parts=(
        *(HeadDim(free=False) if isinstance(part, HeadDim) else part for part in SIZES),
        Value("layer_norm_eps", "norm_eps", 1e-5),
        Value("tie_word_embeddings", "tie_embeddings", False),
        Activation(),
        Flags("use_qkv_bias", ("qkv_bias",)),
        Rope(share=0.25),
        Fixed("qk_layernorm", False),
        Fixed("use_parallel_residual", False),
    ),
    names=SEQUENTIAL,
    fixed={"norm": "layer"},
    without_effect=("hidden_dropout",),
)
