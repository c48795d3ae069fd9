# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-R1-Distill-Qwen 1.5B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finetuning, finish


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """DeepSeek-R1-Distill-Qwen 1.5B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = finetuning()
    config.model.update(
        vocab_size=151936,
        max_positions=131072,
        rope_theta=10000.0,
        norm_eps=1e-06,
        qkv_bias=True,
        embed_dim=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        mlp_dim=8960,
        tie_embeddings=False,
        family="qwen2",
    )
    return finish(config, arg)
