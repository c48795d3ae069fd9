# SPDX-License-Identifier: Apache-2.0
"""StarCoder 2: LayerNorm, an MLP without a gate, biases everywhere but at the head, a window in every layer or none."""

from llm_jepa_jax.models.families.family import LAYER, SEQUENTIAL, Family
from llm_jepa_jax.models.families.parts import SIZES, Activation, Flags, Rope, SlidingWindow, Value

STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    parts=(
        *SIZES,
        Value("norm_epsilon", "norm_eps", 1e-5),
        Value("tie_word_embeddings", "tie_embeddings", True),
        Activation(default="gelu_pytorch_tanh"),
        Flags("use_bias", ("qkv_bias", "out_bias", "mlp_bias"), default=True),
        Rope(),
        SlidingWindow(default=0),
    ),
    names=SEQUENTIAL | {"layers/up": f"{LAYER}.mlp.c_fc", "layers/down": f"{LAYER}.mlp.c_proj"},
    fixed={"norm": "layer", "mlp_gated": False},
    without_effect=("embedding_dropout", "residual_dropout"),
)
