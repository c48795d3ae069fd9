# SPDX-License-Identifier: Apache-2.0
"""What tests of sweeps share: points with given results, and flags of tiny real ones."""

import os
import pathlib

from llm_jepa_jax.sweep.points import points
from llm_jepa_jax.sweep.results import DONE, FAILED, Outcome
from llm_jepa_jax.sweep.spec import from_mapping
from tests.conftest import CACHE, REPOSITORY

TINY = [
    f"--config={REPOSITORY}/configs/tiny.py:smoke", f"--config.train.compile_cache={CACHE}",
    "--config.log.every_steps=5", "--config.log.report=False", "--config.log.tensorboard=False",
    "--config.eval.tasks=perplexity", "--config.eval.final_examples=4", "--config.data.row_length=128",
    "--config.data.rows_per_step=8", "--config.data.max_dropped_share=1", "--config.model.embed_dim=32",
    "--config.model.mlp_dim=64", "--config.checkpoint.every_steps=5", "--config.opt.schedule=constant",
]  # fmt: skip
"""Runs of seconds."""
NTP = "NTP: objective.jepa.weight=0 objective.vicreg.weight=0"


def environment():
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}


def write_records(path: pathlib.Path, count: int = 6) -> pathlib.Path:
    lines = [f'{{"text": "lines with a digit {i}", "code": ".*{i}.*"}}\n' for i in range(count)]
    path.write_text("".join(lines))
    return path


def spec_of(**values):
    return from_mapping({"config": f"{REPOSITORY}/configs/tiny.py:smoke"} | values, "a test")


def outcomes_of(spec, directory, score, metric="exact_match"):
    """Every point with `score(point)`: (dev, test, FLOPs a step), or an error's text."""
    found = []
    for point in points(spec, directory):
        given = score(point)
        if isinstance(given, str):
            found.append(Outcome(point, FAILED, given))
            continue
        dev, test, flops = given
        outcome = Outcome(point, DONE, "", {"step": 10, metric: dev}, {metric: test})
        outcome.__dict__["lines"] = [{"step": 5, "step_flops": flops}, {"step": 10, "step_flops": flops}]
        found.append(outcome)
    return found
