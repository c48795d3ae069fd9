# SPDX-License-Identifier: Apache-2.0
"""The published table of loss dropout (LLM-JEPA, section 5): Llama 3.2 1B Instruct on NL-RX-SYNTH, at equal compute."""

from typing import Any

from llm_jepa_jax.sweep.spec import PAPER_SEEDS

SETTINGS = ((0.5, 1), (0.5, 2), (0.75, 1), (0.75, 2), (0.75, 4))
"""(α, λ), as published."""


def get_sweep() -> dict[str, Any]:
    """Published after six equal shares of compute: 63.96 without dropout, 73.08 with α = 0.75 and λ = 4."""
    return {
        "config": "configs/paper/finetune_nl_rx.py",
        "common": {"eval.every_steps": 20},
        "baseline": {"LD 0, λ 1": {}},
        "variants": {
            f"LD {share:g}, λ {weight}": {"objective.jepa.dropout": share, "objective.jepa.weight": weight}
            for share, weight in SETTINGS
        },
        "seeds": list(PAPER_SEEDS),
        "equal_compute": True,
    }
