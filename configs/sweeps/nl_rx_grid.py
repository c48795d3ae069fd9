# SPDX-License-Identifier: Apache-2.0
"""(λ, k) of JEPA on NL-RX-SYNTH at 5 million parameters: a grid to tune over (`--tune`), or to run whole."""

import pathlib
from typing import Any

from llm_jepa_jax.sweep.spec import PAPER_SEEDS, load


def get_sweep() -> dict[str, Any]:
    """As nl_rx_small.py, with JEPA alone and a grid, half the steps, and three seeds."""
    small = load(str(pathlib.Path(__file__).with_name("nl_rx_small.py"))).to_json()
    return small | {
        "common": small["common"] | {"train.num_steps": 300},
        "variants": {"JEPA": {"objective.jepa.dropout": 0.0}},
        "grid": {"objective.jepa.weight": [0.02, 0.1, 0.5], "objective.jepa.num_predictors": [0, 1, 2]},
        "seeds": list(PAPER_SEEDS[:3]),
        "test": "",
        "equal_compute": False,
    }
