# SPDX-License-Identifier: Apache-2.0
"""What contradicts itself among the objectives is refused in one line with the fix; every variant trains."""

import json

import numpy as np
import pytest

from llm_jepa_jax.config import freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.objectives.diagnostics import collapse_warnings
from llm_jepa_jax.resolve import resolve
from tests.conftest import CACHE, REPOSITORY

STP = {"weight": 0.1}
WRONG = [
    ({"ntp": {"weight": 0.0}}, "ntp.weight`=0 lets the embeddings collapse: .* add `objective.sigreg.weight`"),
    ({"ntp": {"weight": 0.0}, "jepa": {"weight": 0.0}, "stp": STP}, "ntp.weight`=0 lets the embeddings collapse"),
    ({"ntp": {"weight": 0.0}, "jepa": {"weight": 0.0}}, "ntp.weight`=0 and all other weights 0 leave no loss"),
    ({"jepa": {"weight": 0.0}, "sigreg": {"weight": 1.0}}, "sigreg.weight`=1.0 has no views; set `objective.jepa"),
    ({"jepa": {"layer": 7}}, "jepa.layer`=7 is no layer of `model.num_layers`=6; use 0 to 6"),
    ({"stp": {"layer": -8}}, "stp.layer`=-8 is no layer of `model.num_layers`=6; use 0 to 6"),
    ({"jepa": {"min_weight": 0.5}}, "jepa.min_weight`=0.5 has no effect with .*schedule`=constant; use linear"),
    ({"jepa": {"schedule_steps": 9}}, "jepa.schedule_steps`=9 has no effect with"),
    ({"stp": {"schedule": "linear"}}, "stp.schedule`=linear rises to `objective.stp.weight`=0, which is off"),
    ({"jepa": {"schedule": "linear", "min_weight": 2.0}}, "jepa.min_weight`=2.0 is above `objective.jepa.weight`=1"),
    ({"stp": STP | {"mode": "mean", "draw": "both"}}, "stp.draw`=both has no effect with `objective.stp.mode`=mean"),
    ({"stp": STP | {"mode": "e2e", "draws": 2}}, "stp.draws`=2 has no effect with `objective.stp.mode`=e2e"),
    ({"stp": STP | {"mode": "mask", "draws": 2}}, "stp.draws`=2 has no effect with `objective.stp.mode`=mask"),
    ({"stp": STP | {"mode": "curvature", "distance": "mse"}}, "stp.distance`=mse has no effect with"),
    ({"stp": STP | {"mode": "curvature", "linear_predictor": True}}, "stp.linear_predictor`=True has no effect"),
    ({"stp": STP | {"mode": "e2e", "length_weighting": "cosine"}}, "stp.length_weighting`=cosine has no effect"),
    ({"stp": {"draws": 0}}, "stp.draws`=0 must be above 0"),
    ({"stp": {"weight": -1.0}}, "stp.weight`=-1.0 must not be negative"),
    ({"sigreg": {"knots": 1}}, "sigreg.knots`=1 makes no integral; use 2 or more"),
    ({"jepa": {"temperature": 0.0}}, "jepa.temperature`=0.0 must be above 0"),
    ({"jepa": {"view_end_offset": -1}}, "jepa.view_end_offset`=-1 must not be negative"),
]


@pytest.mark.parametrize(("objective", "message"), WRONG)
def test_contradictions_are_refused(objective, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(freeze({"objective": objective}), {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "objective",
    [
        {"vicreg": {"weight": 1.0}},
        {"sigreg": {"weight": 1.0}},
        {"jepa": {"distance": "infonce"}},
        {"stp": STP | {"distance": "infonce"}},
    ],
)
def test_terms_over_all_pairs_refuse_micro_batches(objective):
    with pytest.raises(UserError, match=r"needs all pairs of a step at once, but `train.micro_batches`=2; use 1$"):
        resolve(freeze({"objective": objective, "train": {"micro_batches": 2}}), {})
    resolve(freeze({"objective": objective}), {})


@pytest.mark.parametrize(
    "spread", [{"vicreg": {"weight": 1.0}}, {"sigreg": {"weight": 1.0}}, {"jepa": {"distance": "infonce"}}]
)
def test_what_prevents_collapse_does_without_next_token_prediction(spread):
    resolve(freeze({"objective": {"ntp": {"weight": 0.0}} | spread}), {})


def test_collapse_is_named_once_per_view_and_measure():
    metrics = {"rank_text": 1.2, "rank_code": 9.0, "std_text": 0.5, "std_code": 0.001, "cos_shuffled": 0.998}
    assert collapse_warnings(metrics, 2.0, 0.01, 0.99) == [
        "cos_shuffled=0.998 is over `log.cos_ceiling`=0.99: all views point one way",
        "rank_text=1.2 is under `log.rank_floor`=2: the text view's embeddings collapse",
        "std_code=0.001 is under `log.std_floor`=0.01: the code view's embeddings collapse",
    ]
    assert collapse_warnings(metrics, 0.0, 0.0, 1.0) == collapse_warnings({}, 2.0, 0.01, 0.99) == []


def arguments(workdir):
    """Two steps of the default preset's miniature."""
    return [
        "main", f"--config={REPOSITORY}/configs/tiny.py:smoke", f"--workdir={workdir}", "--config.train.num_steps=2",
        "--config.data.row_length=384", "--config.log.every_steps=1", "--config.log.tensorboard=False",
        "--config.log.report=False", f"--config.train.compile_cache={CACHE}", "--config.eval.final_examples=4",
        "--config.eval.max_new_tokens=2", "--config.checkpoint.every_steps=0",
    ]  # fmt: skip


def test_a_run_warns_of_collapse_once(tmp_path, caplog):
    """While it lasts: a floor above what 8 rows of pairs can reach."""
    with caplog.at_level("WARNING", logger="llm_jepa_jax"):
        run([*arguments(tmp_path), "--config.log.rank_floor=1000"])
    (warning,) = (message for message in caplog.messages if "collapse" in message)
    assert warning.startswith("step 1: rank_text=") and "consider objective.sigreg.weight" in warning


JEPA = "objective.jepa."
VARIANTS = {
    "l2, spans": ([f"{JEPA}distance=l2"], ["mode=random_span"]),
    "mse, ends": ([f"{JEPA}distance=mse"], ["mode=e2e"]),
    "infonce, what a mask leaves": ([f"{JEPA}distance=infonce"], ["mode=mask_recover"]),
    "shared predictor, curvature": (
        [f"{JEPA}num_predictors=10", f"{JEPA}shared_predictor=True", f"{JEPA}view_end=turn"], ["mode=curvature"]
    ),
    "no predictor, mask": (
        [f"{JEPA}num_predictors=0", f"{JEPA}direction=code_to_text", f"{JEPA}view_end_offset=1"], ["mode=mask"]
    ),
    "prepended, means": (
        [f"{JEPA}placement=prepend", f"{JEPA}pooling=mean", f"{JEPA}dropout=0.5", f"{JEPA}dropout_by=step"],
        ["mode=mean"],
    ),
    "an inner layer, several draws": (
        [
            f"{JEPA}pooling=mean", f"{JEPA}layer=1", f"{JEPA}final_norm=False", "train.micro_batches=2",
            "data.rows_per_step=16",
        ],
        ["draw=both", "from_start=True", "draws=3", "distance=mse"],
    ),
    "a linear predictor, short spans": (
        [
            f"{JEPA}linear_predictor=True", f"{JEPA}schedule=linear", f"{JEPA}min_weight=0.1",
            f"{JEPA}stop_gradient=True",
        ],
        ["draw=uniform", "max_length=4", "length_weighting=cosine", "layer=-2", "final_norm=False"],
    ),
    "both regularisers, whole conversations": (
        [f"{JEPA}dropout=0.5", "objective.sigreg.weight=0.1", "objective.vicreg.weight=0.1"],
        ["across_turns=True", "whole_conversation=True", "length_weighting=jaccard", "linear_predictor=True"],
    ),
    "no next token, masks against each other": (
        ["objective.ntp.weight=0", "objective.sigreg.weight=1", "objective.ntp.targets=all"],
        ["mode=mask", "across_turns=True", "whole_conversation=True", "distance=infonce"],
    ),
    "pairs alone": ([f"{JEPA}weight=0.5"], []),
    "spans alone": ([f"{JEPA}weight=0"], ["mode=random_span"]),
}  # fmt: skip
"""Keys of pairs and of spans: each key is tried once, and each kind of term without the other."""


SLOW = ("l2, spans", "mse, ends", "no predictor, mask", "an inner layer, several draws")
"""Their distances, spans and views are held to references in test_distance, test_stp and test_terms."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in VARIANTS]
)
def test_every_variant_trains(tmp_path, name):
    """Two steps by the command line: every enabled term has a finite value, and its own column."""
    pairs, spans = VARIANTS[name]
    changes = [*pairs, *(f"objective.stp.{change}" for change in spans)]
    argv = [
        *arguments(tmp_path), "--config.objective.jepa.dropout=0.0", "--config.objective.vicreg.weight=0.0",
        f"--config.objective.stp.weight={0.1 if spans else 0.0}", *(f"--config.{change}" for change in changes),
    ]  # fmt: skip
    result = run(argv)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "total_loss" in line]
    assert result["step"] == 2 and len(steps) == 2
    names = {name for name in ("ntp", "jepa") if f"objective.{name}.weight=0" not in changes}
    names |= {name for name in ("stp", "vicreg", "sigreg") if any(name in change for change in changes)}
    for name in names:
        values = [line[f"{name}_loss"] for line in steps if f"{name}_loss" in line]
        assert values and np.isfinite(values).all(), name
    assert {name for line in steps for name in line if name.endswith("_loss")} == {
        f"{name}_loss" for name in names | {"total"}
    }
