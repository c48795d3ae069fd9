# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on GSM8K, Qwen 3 1.7B: 44.32 ± 0.39 for next-token training, 45.00 ± 0.40 with JEPA."""

import ml_collections

from llm_jepa_jax.presets import finish, published_row


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """λ = 1, k = 0, learning rate 4e-05; `:smoke` makes it a miniature with random weights."""
    config = published_row("Qwen/Qwen3-1.7B", "gsm8k", "gsm8k", 4e-05)
    config.objective.jepa.update(weight=1.0, num_predictors=0)
    return finish(config, arg)
