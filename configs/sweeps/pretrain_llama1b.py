# SPDX-License-Identifier: Apache-2.0
"""The published pretraining row: a model of Llama 3.2 1B's shape from random weights on NL-RX-SYNTH, five seeds."""

from typing import Any

from llm_jepa_jax.sweep.spec import PAPER_SEEDS


def get_sweep() -> dict[str, Any]:
    """λ, k and the learning rate are the published ones, so nothing is chosen by the test records.

    Rows of a step differ so that every variant sees about as many examples a step (101 to 105), and so takes about as
    many steps (305 and 316) for its 4 epochs.
    """
    return {
        "config": "configs/paper/pretrain_llama1b.py",
        "common": {
            "data.train": "synth_train.jsonl", "data.eval": "synth_test.jsonl", "log.report": False,
            "log.tensorboard": False,
        },
        "baseline": {"NTP": {"objective.jepa.weight": 0, "data.rows_per_step": 8}},
        "variants": {"JEPA": {"data.rows_per_step": 10}},
        "seeds": list(PAPER_SEEDS),
        "metric": "starts_with",
    }  # fmt: skip
