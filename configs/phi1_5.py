# SPDX-License-Identifier: Apache-2.0
"""Phi 1.5: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finetuning, finish


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Phi 1.5 with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = finetuning()
    config.model.update(
        vocab_size=51200,
        max_positions=2048,
        rope_theta=10000.0,
        rope_share=0.5,
        block="parallel",
        norm="layer",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        mlp_gated=False,
        activation="gelu_tanh",
        head_bias=True,
        embed_dim=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        head_dim=64,
        mlp_dim=8192,
        tie_embeddings=False,
        family="phi",
    )
    config.data.row_length = 2048
    return finish(config, arg)
