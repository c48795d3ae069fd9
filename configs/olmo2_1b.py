# SPDX-License-Identifier: Apache-2.0
"""OLMo 2 1B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finish, olmo2


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """OLMo 2 1B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = olmo2()
    config.model.update(
        embed_dim=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        mlp_dim=8192,
    )
    return finish(config, arg)
