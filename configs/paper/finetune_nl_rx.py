# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on NL-RX-SYNTH, Llama 3.2 1B Instruct: 57.29 ± 5.32 for next-token training, 71.46 ± 1.34 with JEPA."""

import ml_collections

from llm_jepa_jax.presets import finish, published_row


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """λ = 1, k = 1, learning rate 2e-05; `:smoke` makes it a miniature with random weights."""
    config = published_row("meta-llama/Llama-3.2-1B-Instruct", "synth", "exact_match", 2e-05)
    config.objective.jepa.update(weight=1.0, num_predictors=1)
    return finish(config, arg)
