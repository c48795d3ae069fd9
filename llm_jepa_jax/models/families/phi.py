# SPDX-License-Identifier: Apache-2.0
"""Phi 1 and 1.5 (attention and MLP side by side, LayerNorm, biases, part of each head rotated); Phi 3 and 4 (fused)."""

from llm_jepa_jax.models.families.family import LAYER, SEQUENTIAL, Family
from llm_jepa_jax.models.families.parts import SIZES, Activation, Fixed, Rope, SlidingWindow, Value

PHI = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    parts=(
        *SIZES,
        Value("layer_norm_eps", "norm_eps", 1e-5),
        Value("tie_word_embeddings", "tie_embeddings", False),
        Activation(default="gelu_new"),
        Rope(share=0.5),
        Fixed("qk_layernorm", False),
    ),
    names={
        "embedding": "model.embed_tokens",
        "layers/norm": f"{LAYER}.input_layernorm",
        "layers/query": f"{LAYER}.self_attn.q_proj",
        "layers/key": f"{LAYER}.self_attn.k_proj",
        "layers/value": f"{LAYER}.self_attn.v_proj",
        "layers/out": f"{LAYER}.self_attn.dense",
        "layers/up": f"{LAYER}.mlp.fc1",
        "layers/down": f"{LAYER}.mlp.fc2",
        "final_norm": "model.final_layernorm",
        "head": "lm_head",
    },
    fixed={
        "block": "parallel",
        "norm": "layer",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "mlp_gated": False,
        "head_bias": True,
    },
    without_effect=("embd_pdrop", "resid_pdrop"),
)

PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    parts=(
        *SIZES,
        Value("rms_norm_eps", "norm_eps", 1e-5),
        Value("tie_word_embeddings", "tie_embeddings", False),
        Activation(),
        Rope(scaled=False),
        SlidingWindow(default=0),
        Fixed("attention_bias", False),
    ),
    names=SEQUENTIAL
    | dict.fromkeys(("layers/query", "layers/key", "layers/value"), f"{LAYER}.self_attn.qkv_proj")
    | dict.fromkeys(("layers/gate", "layers/up"), f"{LAYER}.mlp.gate_up_proj"),
    without_effect=("embd_pdrop", "resid_pdrop", "original_max_position_embeddings"),
)
