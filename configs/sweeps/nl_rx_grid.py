# SPDX-License-Identifier: Apache-2.0
"""(λ, k) of JEPA on NL-RX-SYNTH at 5 million parameters: a grid to tune over (`--tune`), or to run whole."""

import pathlib
from typing import Any

from llm_jepa_jax.sweep.spec import load


def get_sweep() -> dict[str, Any]:
    """As nl_rx_small.py, with JEPA alone and a grid."""
    return load(str(pathlib.Path(__file__).with_name("nl_rx_small.py"))).to_json() | {
        "variants": {"JEPA": {"objective.jepa.dropout": 0.0}},
        "grid": {"objective.jepa.weight": [0.02, 0.1, 0.5, 2], "objective.jepa.num_predictors": [0, 1, 2, 4]},
        "equal_compute": False,
    }
