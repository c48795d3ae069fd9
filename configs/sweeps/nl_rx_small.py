# SPDX-License-Identifier: Apache-2.0
"""NTP, JEPA, JEPA with loss dropout 0.75, and STP: 5 million parameters from random weights on NL-RX-SYNTH."""

from typing import Any

from llm_jepa_jax.sweep.spec import PAPER_SEEDS

OFF = {"objective.jepa.weight": 0, "objective.vicreg.weight": 0}
TUNED = {"objective.jepa.weight": 0.5, "objective.jepa.num_predictors": 0}
"""What `--tune` found in nl_rx_grid.py."""
SMALL = {
    "data.train": "synth_train.jsonl", "data.eval_share": 0.05, "objective.ntp.targets": "all",
    "model.embed_dim": 256, "model.num_heads": 8, "model.num_kv_heads": 4, "model.mlp_dim": 704,
    "train.num_epochs": 0, "train.num_steps": 400, "eval.every_steps": 200,
    "log.report": False, "log.tensorboard": False,
}  # fmt: skip
"""Of every point; 5% of the training lines are held out to choose by."""


def get_sweep() -> dict[str, Any]:
    """At equal steps; what does not take the baseline's FLOPs then is trained at equal compute too."""
    return {
        "config": "configs/tiny.py",
        "common": SMALL,
        "baseline": {"NTP": OFF},
        "variants": {
            "JEPA": TUNED | {"objective.jepa.dropout": 0.0},
            "JEPA, LD 0.75": TUNED | {"objective.jepa.dropout": 0.75},
            "STP": OFF | {"objective.stp.weight": 0.02},
        },
        "seeds": list(PAPER_SEEDS),
        "metric": "exact_match",
        "test": "synth_test.jsonl",
        "equal_compute": True,
    }
