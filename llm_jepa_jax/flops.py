# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic training takes."""

from llm_jepa_jax.config import ModelConfig


def model_flops(config: ModelConfig, tokens: float, targets: float, length: int, frozen: bool = False) -> float:
    """FLOPs that training on `tokens` tokens needs (forward and backward, no recomputation).

    6 for every weight a token meets, causal attention over `length`, and the head at target slots only. `frozen`
    weights take 4: they have no gradient. Adapters beside them are not counted.
    """
    layers = [config.layer(number) for number in range(config.num_layers)]
    weights = sum(map(layer_weights, layers))
    scores = sum(layer.num_heads * layer.head_dim * length for layer in layers)
    a_weight = 4 if frozen else 6
    return tokens * (a_weight * weights + 6 * scores) + targets * a_weight * config.embed_dim * config.vocab_size


def layer_weights(layer: ModelConfig) -> int:
    """Parameters of the matrices of one block, or of the largest where blocks differ."""
    attention = layer.head_dim * 2 * (layer.num_heads + layer.num_kv_heads)
    return layer.embed_dim * (attention + (3 if layer.mlp_gated else 2) * layer.mlp_dim)
