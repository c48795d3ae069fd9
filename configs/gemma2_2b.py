# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 2B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finetuning, finish


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Gemma 2 2B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = finetuning()
    config.model.update(
        vocab_size=256000,
        max_positions=8192,
        rope_theta=10000.0,
        norm="rms_plus_one",
        norm_placement="both",
        norm_eps=1e-06,
        activation="gelu_tanh",
        window=4096,
        window_pattern="LG",
        score_width=256.0,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        scale_embeddings=True,
        embed_dim=2304,
        num_layers=26,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        mlp_dim=9216,
        tie_embeddings=True,
        family="gemma2",
    )
    return finish(config, arg)
