# SPDX-License-Identifier: Apache-2.0
"""OpenELM 1.1B: the published shape."""

import ml_collections

from llm_jepa_jax.presets import finetuning, finish

HEADS = (16,) * 3 + (20,) * 7 + (24,) * 8 + (28,) * 6 + (32,) * 4
MLP_DIMS = (
    1024, 1280, 1536, 1792, 2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840, 4096, 4608, 4608, 5120, 5376, 5632, 5888,
    6144, 6400, 6656, 6912, 7168, 7424, 7680, 7936, 8192,
)  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """OpenELM 1.1B with next-token and JEPA loss; `:smoke` makes it a miniature."""
    config = finetuning()
    config.model.update(
        vocab_size=32000,
        max_positions=2048,
        rope_theta=10000.0,
        norm_eps=1e-06,
        qk_norm="head",
        embed_dim=2048,
        num_layers=28,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=8192,
        layer_heads=HEADS,
        layer_kv_heads=tuple(heads // 4 for heads in HEADS),
        layer_mlp_dims=MLP_DIMS,
        tie_embeddings=True,
        family="openelm",
    )
    config.data.row_length = 2048
    return finish(config, arg)
