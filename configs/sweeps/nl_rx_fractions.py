# SPDX-License-Identifier: Apache-2.0
"""NTP, JEPA with loss dropout and STP on all of NL-RX-SYNTH and on 1/2 to 1/16 of it, at equal steps."""

from typing import Any

from llm_jepa_jax.sweep.spec import PAPER_SEEDS

OFF = {"objective.jepa.weight": 0, "objective.vicreg.weight": 0}
FRACTIONS = {"all": 1.0, "1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16}
DEV_SHARE = 0.05


def get_sweep() -> dict[str, Any]:
    """A fraction is that of the training lines; the seed draws which. 400 of the others are there to choose by."""
    return {
        "config": "configs/tiny.py",
        "common": {
            "data.train": "synth_train.jsonl", "objective.ntp.targets": "all", "model.embed_dim": 256,
            "model.num_heads": 8, "model.num_kv_heads": 4, "model.mlp_dim": 704, "train.num_epochs": 0,
            "train.num_steps": 600, "eval.every_steps": 300, "eval.final_examples": 400, "log.report": False,
            "log.tensorboard": False,
        },
        "rows": {name: {"data.eval_share": max(DEV_SHARE, 1 - share)} for name, share in FRACTIONS.items()},
        "baseline": {"NTP": OFF},
        "variants": {
            "JEPA, LD 0.75": {"objective.jepa.weight": 0.4, "objective.jepa.dropout": 0.75},
            "STP": OFF | {"objective.stp.weight": 0.02},
        },
        "seeds": list(PAPER_SEEDS),
        "metric": "exact_match",
        "test": "synth_test.jsonl",
    }  # fmt: skip
