# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic training takes."""

from llm_jepa_jax.config import ModelConfig


def model_flops(config: ModelConfig, tokens: float, targets: float, length: int) -> float:
    """FLOPs that training on `tokens` tokens needs (forward and backward, no recomputation).

    6 for every weight a token meets, causal attention over `length`, and the head at target slots only.
    """
    weights = scores = 0
    for layer in (config.layer(number) for number in range(config.num_layers)):
        attention = layer.head_dim * 2 * (layer.num_heads + layer.num_kv_heads)
        weights += layer.embed_dim * (attention + (3 if layer.mlp_gated else 2) * layer.mlp_dim)
        scores += layer.num_heads * layer.head_dim * length
    return tokens * 6 * (weights + scores) + targets * 6 * config.embed_dim * config.vocab_size
