# SPDX-License-Identifier: Apache-2.0
"""NTP, JEPA with loss dropout and STP on all of NL-RX-SYNTH and on 1/2 to 1/16 of it, at equal steps."""

import pathlib
from typing import Any

from llm_jepa_jax.sweep.spec import load

FRACTIONS = {"all": 1.0, "1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16}
DEV_SHARE = 0.05


def get_sweep() -> dict[str, Any]:
    """As nl_rx_small.py. A fraction is that of the training lines; the seed draws which. 400 others choose."""
    small = load(str(pathlib.Path(__file__).with_name("nl_rx_small.py"))).to_json()
    return small | {
        "common": small["common"] | {"eval.final_examples": 400},
        "rows": {name: {"data.eval_share": max(DEV_SHARE, 1 - share)} for name, share in FRACTIONS.items()},
        "variants": {name: small["variants"][name] for name in ("JEPA, LD 0.75", "STP")},
        "equal_compute": False,
    }
