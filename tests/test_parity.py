# SPDX-License-Identifier: Apache-2.0
"""Logits of Hugging Face's Llama on random weights, to 1e-4."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import ModelConfig, RopeScalingConfig
from llm_jepa_jax.models.transformer import forward, head_kernel
from tests.test_model import llama_params

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    ("tie", "factor", "heads", "kv_heads"),
    [(True, 1.0, 4, 4), (False, 8.0, 4, 4), (False, 1.0, 6, 2), (True, 8.0, 6, 2)],
)
def test_logits_equal_hugging_face(tie, factor, heads, kv_heads):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    scaling = RopeScalingConfig(factor=factor, original_max_positions=64)
    config = ModelConfig(
        vocab_size=96, embed_dim=48, num_layers=3, num_heads=heads, num_kv_heads=kv_heads, head_dim=16, mlp_dim=80,
        max_positions=512, rope_theta=10000.0, rope_scaling=scaling, tie_embeddings=tie, vocab_multiple=1,
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if factor != 1.0:
        rope |= {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }  # fmt: skip
    hf = transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=16, intermediate_size=80, max_position_embeddings=512, rope_parameters=rope, rms_norm_eps=1e-5,
        tie_word_embeddings=tie, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(hf).eval()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    tokens = np.random.default_rng(0).integers(0, 96, (2, 200)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    positions = np.broadcast_to(np.arange(200), tokens.shape)
    params = llama_params(weights, config)
    hidden = forward(params, config, tokens, positions, np.ones_like(tokens), dtype=jnp.float32)
    logits = np.asarray(hidden @ head_kernel(params, config))
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-4
