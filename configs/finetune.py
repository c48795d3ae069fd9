# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a published checkpoint, whatever its family: add `--config.init.checkpoint=DIRECTORY`."""

import ml_collections

from llm_jepa_jax.config import base_config
from llm_jepa_jax.presets import finish


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The published fine-tuning setting: λ = 1, k = 1, learning rate 2e-5, 4 epochs, all tokens as targets.

    With loss dropout α, λ · (1 − α) is kept at 1. Size, tokenizer and chat template are the checkpoint's; `:smoke` is a
    miniature with random weights.
    """
    config = base_config()
    config.data.update(layout="shared", row_length=2048, rows_per_step=8)
    config.objective.ntp.targets = "all"
    config.objective.jepa.update(weight=4.0, num_predictors=1, dropout=0.75)
    config.mesh.update(data=1, fsdp=-1)
    config.opt.update(learning_rate=2e-5, warmup_steps=20, weight_decay=0.0)
    config.train.update(remat="full", num_epochs=4)
    return finish(config, arg)
