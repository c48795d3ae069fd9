# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on HellaSwag, Llama 3.2 1B Instruct: 69.40 ± 0.99 for next-token training, 70.51 ± 1.20 with JEPA."""

import ml_collections

from llm_jepa_jax.presets import finish, published_row


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """λ = 1, k = 3, learning rate 4e-05; `:smoke` makes it a miniature with random weights."""
    config = published_row("meta-llama/Llama-3.2-1B-Instruct", "hellaswag", "hellaswag", 4e-05)
    config.objective.jepa.update(weight=1.0, num_predictors=3)
    return finish(config, arg)
