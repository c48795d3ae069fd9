# SPDX-License-Identifier: Apache-2.0
"""Llama 3.2 1B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finish, llama3


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Llama 3.2 1B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = llama3()
    config.model.update(
        embed_dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=8192,
        tie_embeddings=True,
    )
    config.model.rope_scaling.factor = 32.0
    return finish(config, arg)
