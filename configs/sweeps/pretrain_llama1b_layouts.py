# SPDX-License-Identifier: Apache-2.0
"""The published pretraining row's JEPA by other means: separate views, and loss dropout with λ · (1 − α) kept."""

from typing import Any

from llm_jepa_jax.sweep.spec import PAPER_SEEDS


def get_sweep() -> dict[str, Any]:
    """As in pretrain_llama1b.py: 291 steps with loss dropout, 320 with separate views."""
    return {
        "config": "configs/paper/pretrain_llama1b.py",
        "common": {
            "data.train": "synth_train.jsonl", "data.eval": "synth_test.jsonl", "log.report": False,
            "log.tensorboard": False,
        },
        "variants": {
            "LD 0.75": {"objective.jepa.dropout": 0.75, "objective.jepa.weight": 8, "data.rows_per_step": 9},
            "separate": {"data.layout": "separate", "data.rows_per_step": 14},
        },
        "seeds": list(PAPER_SEEDS),
        "metric": "starts_with",
    }  # fmt: skip
