# SPDX-License-Identifier: Apache-2.0
"""Small random models of every published family, as `transformers` makes and saves them (needs the parity extra)."""

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 80, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 8.0, "beta_slow": 0.5,
}  # fmt: skip
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
GEMMA = {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 24}

CASES = {
    "llama2": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama3": ("Llama", {"head_dim": 16, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear-biased": (
        "Llama", {"head_dim": 10, "rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}
    ),
    "mistral": ("Mistral", {"sliding_window": 24, "head_dim": 16}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", QWEN_WINDOW),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN | {"truncate": False, "mscale": 1.0, "mscale_all_dim": 0.4}}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3-windows-biased": ("Qwen3", {"head_dim": 16, "attention_bias": True, **QWEN_WINDOW}),
    "olmo2": ("Olmo2", {}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3Text",
        GEMMA | {
            "num_hidden_layers": 7, "rope_parameters": {
                "full_attention": LINEAR | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi": ("Phi", {"num_attention_heads": 3, "num_key_value_heads": 3, "partial_rotary_factor": 0.5}),
    "phi-grouped-tied": ("Phi", {"head_dim": 20, "partial_rotary_factor": 0.4, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "olmo3": (
        "Olmo3", {
            "sliding_window": 24, "num_hidden_layers": 5, "head_dim": 16, "rope_parameters": {
                "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "ministral": (
        "Ministral",
        {"head_dim": 16, "sliding_window": 24, "layer_types": ["full_attention", *["sliding_attention"] * 2]},
    ),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2", {"sliding_window": 24, "num_key_value_heads": 3}),
    "phi3": ("Phi3", {"sliding_window": 24}),
    "gemma3-untied": ("Gemma3Text", GEMMA | {"tie_word_embeddings": False, "num_hidden_layers": 2}),
}  # fmt: skip
"""Name to the family's class and what it changes: heads in groups of 3, widths that are not D / H, windows of 24."""


def make_model(case, seed=0, **changes):
    """A model in evaluation mode; norms and biases are random too."""
    import torch
    import transformers

    family, special = CASES[case]
    config = getattr(transformers, f"{family}Config")(**(SIZES | special | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def reference(model, tokens):
    """Hidden states of every layer and logits of one sequence, as numpy arrays: [N + 1, L, D] and [L, V]."""
    import numpy as np
    import torch

    with torch.no_grad():
        out = model(torch.tensor(np.asarray(tokens)[None], dtype=torch.long), output_hidden_states=True)
    return np.stack([state[0].float().numpy() for state in out.hidden_states]), out.logits[0].float().numpy()
