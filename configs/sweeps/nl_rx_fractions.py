# SPDX-License-Identifier: Apache-2.0
"""NTP, JEPA with loss dropout and STP on 1/2 to 1/16 of NL-RX-SYNTH, at equal steps."""

import pathlib
from typing import Any

from llm_jepa_jax.sweep.spec import load

FRACTIONS = {"1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16}


def get_sweep() -> dict[str, Any]:
    """As nl_rx_small.py, half as long. A fraction is that of the training lines; the seed draws which."""
    small = load(str(pathlib.Path(__file__).with_name("nl_rx_small.py"))).to_json()
    shorter = {"train.num_steps": 200, "eval.every_steps": 0, "eval.final_examples": 100}
    return small | {
        "common": small["common"] | shorter,
        "rows": {name: {"data.eval_share": 1 - share} for name, share in FRACTIONS.items()},
        "variants": {name: small["variants"][name] for name in ("JEPA, LD 0.75", "STP")},
        "equal_compute": False,
    }
