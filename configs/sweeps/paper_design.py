# SPDX-License-Identifier: Apache-2.0
"""The published design choices (LLM-JEPA, ablations): Llama 3.2 1B Instruct on NL-RX-SYNTH, one changed at a time."""

from typing import Any

from llm_jepa_jax.sweep.spec import PAPER_SEEDS


def get_sweep() -> dict[str, Any]:
    """Published: 71.46 for the cosine, then in order 2.22, 70.64, 68.07, 65.70, 34.40, 65.46 and 70.16.

    Layout `separate`, which every choice can be trained in.
    """
    return {
        "config": "configs/paper/finetune_nl_rx.py",
        "common": {"data.layout": "separate"},
        "baseline": {"NTP": {"objective.jepa.weight": 0}},
        "variants": {
            "cosine": {},
            "l2": {"objective.jepa.distance": "l2"},
            "mse": {"objective.jepa.distance": "mse"},
            "predictors first": {"objective.jepa.placement": "prepend"},
            "code to text": {"objective.jepa.direction": "code_to_text"},
            "InfoNCE": {"objective.jepa.distance": "infonce"},
            "mean pooling": {"objective.jepa.pooling": "mean"},
            "linear predictor": {"objective.jepa.linear_predictor": True, "objective.jepa.weight": 0.5},
        },
        "seeds": list(PAPER_SEEDS),
    }
