# SPDX-License-Identifier: Apache-2.0
"""Qwen 3 1.7B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finetuning, finish


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Qwen 3 1.7B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = finetuning()
    config.model.update(
        vocab_size=151936,
        max_positions=40960,
        rope_theta=1000000.0,
        norm_eps=1e-06,
        qk_norm="head",
        embed_dim=2048,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=6144,
        tie_embeddings=True,
        family="qwen3",
    )
    return finish(config, arg)
