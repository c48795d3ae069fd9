# SPDX-License-Identifier: Apache-2.0
"""STP's claim (arXiv 2602.22617): NL-RX-SYNTH whole and down to 1/16 of it, Llama 3.2 1B Instruct."""

from typing import Any

from llm_jepa_jax.sweep.spec import PAPER_SEEDS

HELD_OUT = {"all": 0.05, "1/2": 1 / 2, "1/4": 3 / 4, "1/8": 7 / 8, "1/16": 15 / 16}


def get_sweep() -> dict[str, Any]:
    """Published: with 1/16 of the data STP is as accurate as its baseline with all. The seed draws the lines."""
    return {
        "config": "configs/paper/stp_nl_rx.py",
        "common": {"data.eval": "", "eval.final_examples": 400},
        "rows": {name: {"data.eval_share": share} for name, share in HELD_OUT.items()},
        "baseline": {"NTP": {"objective.stp.weight": 0}},
        "variants": {"STP": {}},
        "seeds": list(PAPER_SEEDS),
        "test": "synth_test.jsonl",
    }
