# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 70B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finish, llama3


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Llama 3.1 70B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = llama3()
    config.model.update(
        embed_dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=28672,
        tie_embeddings=False,
    )
    config.model.rope_scaling.factor = 8.0
    config.mesh.tensor = 8
    return finish(config, arg)
