# SPDX-License-Identifier: Apache-2.0
"""What presets share: every one of them takes `:smoke`."""

import ml_collections

from llm_jepa_jax.errors import UserError


def finish(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """The preset itself, or with `smoke` a 2-layer miniature of it that runs anywhere in seconds.

    Raises:
        UserError: another argument.
    """
    if arg not in ("", "smoke"):
        raise UserError(f"--config: presets take `:smoke` or nothing, not `:{arg}`")
    return smoke(config) if arg else config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks sizes and lengths, and keeps what makes the preset itself: dtypes, remat, rope, tying, objective."""
    config.text.tokenizer, config.text.vocab_size = "", 512
    config.data.train, config.data.eval = "synthetic", ""
    config.data.synthetic_train, config.data.synthetic_eval = 400, 40
    config.data.row_length, config.data.rows_per_step = 256, 8
    config.model.update(
        vocab_size=0, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128,
        max_positions=1024,
    )  # fmt: skip
    config.opt.warmup_steps = 1
    config.train.num_steps, config.train.num_epochs = 4, 0
    config.checkpoint.every_steps = 2
    config.eval.every_steps, config.eval.final_examples = 0, 16
    config.eval.max_new_tokens, config.eval.batch_size = 16, 16
    config.log.every_steps, config.log.report_pairs = 1, 40
    return config
