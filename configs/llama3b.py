# SPDX-License-Identifier: Apache-2.0
"""Llama 3.2 3B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finish, llama3


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Llama 3.2 3B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = llama3()
    config.model.update(
        embed_dim=3072,
        num_layers=28,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=8192,
        tie_embeddings=True,
    )
    config.model.rope_scaling.factor = 32.0
    return finish(config, arg)
