# SPDX-License-Identifier: Apache-2.0
"""STP (arXiv 2602.22617) on NL-RX-SYNTH, Llama 3.2 1B Instruct: a random span, λ = 0.02, and no pairs of views."""

import ml_collections

from llm_jepa_jax.presets import finish, published_row


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Learning rate 2e-5; `:smoke` makes it a miniature with random weights."""
    config = published_row("meta-llama/Llama-3.2-1B-Instruct", "synth", "exact_match", 2e-5)
    config.objective.jepa.weight = 0.0
    config.objective.stp.weight = 0.02
    return finish(config, arg)
