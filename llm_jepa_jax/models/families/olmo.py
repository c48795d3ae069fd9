# SPDX-License-Identifier: Apache-2.0
"""OLMo 2: norms on what attention and MLP give, and of all queries and all keys together."""

from llm_jepa_jax.models.families.family import LAYER, SEQUENTIAL, Family
from llm_jepa_jax.models.families.parts import SIZES, Activation, Flags, Rope, Value

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    parts=(
        *SIZES,
        Value("rms_norm_eps", "norm_eps", 1e-5),
        Value("tie_word_embeddings", "tie_embeddings", False),
        Activation(),
        Flags("attention_bias", ("qkv_bias", "out_bias")),
        Rope(),
    ),
    names=SEQUENTIAL
    | {
        "layers/attention_post_norm": f"{LAYER}.post_attention_layernorm",
        "layers/mlp_post_norm": f"{LAYER}.post_feedforward_layernorm",
    },
    fixed={"norm_placement": "post", "qk_norm": "full"},
)
