# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 405B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finish, llama3


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Llama 3.1 405B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = llama3()
    config.model.update(
        embed_dim=16384,
        num_layers=126,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=53248,
        tie_embeddings=False,
    )
    config.model.rope_scaling.factor = 8.0
    config.mesh.tensor = 8
    return finish(config, arg)
