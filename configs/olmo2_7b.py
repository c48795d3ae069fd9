# SPDX-License-Identifier: Apache-2.0
"""OLMo 2 7B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finish, olmo2


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """OLMo 2 7B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = olmo2()
    config.model.update(
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_dim=11008,
    )
    return finish(config, arg)
