# SPDX-License-Identifier: Apache-2.0
"""The default: 2.6 million parameters trained from random weights, minutes on a laptop CPU."""

import ml_collections

from llm_jepa_jax.config import base_config
from llm_jepa_jax.presets import finish


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Two passes over the embedded corpus; `:smoke` makes it a miniature.

    From random weights the cosine alone lets both views collapse to one direction, so VICReg is on, and λ is small
    enough that next-token prediction still leads.
    """
    config = base_config()
    config.model.init_std = 0.06  # 1 / sqrt(D): copying words from the prompt is learnt in half the steps of 0.02
    config.data.update(row_length=512, rows_per_step=4)
    config.objective.jepa.update(weight=0.1, num_predictors=1, dropout=0.75)
    config.objective.vicreg.weight = 0.1
    config.opt.update(learning_rate=3e-3, warmup_steps=50)
    config.train.num_epochs = 2
    config.eval.update(every_steps=100, max_new_tokens=96)
    return finish(config, arg)
