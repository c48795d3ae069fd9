# SPDX-License-Identifier: Apache-2.0
"""(λ, k) of JEPA on NL-RX-SYNTH at 5 million parameters: a grid to tune over (`--tune`), or to run whole."""

import importlib.util
import pathlib
from typing import Any


def get_sweep() -> dict[str, Any]:
    """As nl_rx_small.py, with JEPA alone and a grid."""
    file = importlib.util.spec_from_file_location("nl_rx_small", pathlib.Path(__file__).with_name("nl_rx_small.py"))
    small = importlib.util.module_from_spec(file)
    file.loader.exec_module(small)
    return small.get_sweep() | {
        "variants": {"JEPA": {"objective.jepa.dropout": 0.0}},
        "grid": {"objective.jepa.weight": [0.02, 0.1, 0.5, 2], "objective.jepa.num_predictors": [0, 1, 2, 4]},
        "equal_compute": False,
    }
