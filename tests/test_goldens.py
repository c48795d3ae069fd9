# SPDX-License-Identifier: Apache-2.0
"""The published code's losses and gradient norms on its own inputs (three passes)."""

import json

import jax
import numpy as np
import optax
import pytest

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.config import Config, DataConfig
from llm_jepa_jax.objective_config import JepaConfig, NtpConfig, ObjectiveConfig
from llm_jepa_jax.train.step import gradients
from tests.test_model import golden_model

VIEWS = ("user", "assistant")
FIRST_PREDICTOR = 8
"""Its id in the reference's tokenizer."""


def reference_batch(golden, expected, name):
    """The reference's rows as one of ours each: conversation and both views behind one another.

    The reference calls the view that predicts `user`: with its `--reverse_pred` that is the code view.
    """
    parts = [(golden["synth/input_ids"], golden["synth/attention_mask"])]
    parts += [(golden[f"{name}/input_ids_{v}"], golden[f"{name}/attention_mask_{v}"]) for v in VIEWS]
    length = parts[0][0].shape[1]
    tokens = np.concatenate([ids for ids, _ in parts], axis=1).astype(np.int32)
    segments = np.concatenate([mask * number for number, (_, mask) in enumerate(parts, start=1)], axis=1)
    positions = np.tile(np.arange(length, dtype=np.int32), (len(tokens), 3))
    mask = parts[0][1]
    index = np.broadcast_to(np.arange(length - 1, dtype=np.int32), (len(tokens), length - 1))
    ones = np.ones((len(tokens), 1), np.float32)
    places = [length * (1 + i) + np.array(expected[f"index_{v}"], np.int32)[:, None] for i, v in enumerate(VIEWS)]
    return Batch(
        tokens=tokens,
        positions=positions,
        segments=segments.astype(np.int32),
        branch_end=np.zeros((len(tokens), 1), np.int32),
        target_index=index,
        targets=tokens[:, 1:length],
        target_weight=mask[:, 1:].astype(np.float32),
        predictor_index=places[0],
        predictor_start=np.full_like(places[0], length),
        code_index=places[1],
        code_start=np.full_like(places[1], 2 * length),
        pair_weight=ones,
        span_points=np.zeros((len(tokens), 0, 6), np.int32),
        span_weight=np.zeros((len(tokens), 0), np.float32),
        num_examples=np.ones(len(tokens), np.int32),
    )


@pytest.mark.parametrize("last_token", [-1, -2])
@pytest.mark.parametrize(
    ("predictors", "placement", "direction"),
    [
        (0, "append", "text_to_code"),
        (1, "append", "text_to_code"),
        (1, "prepend", "text_to_code"),
        (0, "append", "code_to_text"),
        (1, "append", "code_to_text"),
        (1, "prepend", "code_to_text"),
    ],
)
def test_losses_and_gradient_norms(shared_dir, predictors, placement, direction, last_token):
    model, params, golden = golden_model(shared_dir)
    values = json.loads((shared_dir / "goldens" / "goldens.json").read_text())["finetune"]
    name = f"synth/k{predictors}_f{placement == 'prepend':d}_r{direction == 'code_to_text':d}"
    expected = values[f"{name}_three_lt{last_token}_cosine"]
    batch = reference_batch(golden, expected, name)
    predictor_row, predictor_place = np.nonzero(batch.tokens == FIRST_PREDICTOR)
    assert len(predictor_row) == 8 * predictors  # they lie in the view that predicts, before or behind its content
    assert (batch.segments[predictor_row, predictor_place] == 2).all()
    left = batch.predictor_index[predictor_row, 0] - predictor_place
    assert (left <= 1).all() if placement == "append" else (left > 1).all()
    objective = ObjectiveConfig(
        ntp=NtpConfig(targets="all"),
        jepa=JepaConfig(weight=1.0, num_predictors=predictors, placement=placement, direction=direction),
        head_chunk=50,
    )
    config = Config(model=model, objective=objective, data=DataConfig(rows_per_step=8))
    total, grads, aux, weights = jax.jit(lambda p, b: gradients(p, b, config))(params, batch)
    ntp, jepa = (float(aux["sums"][name] / weights[name]) for name in ("ntp", "jepa"))
    assert ntp == pytest.approx(expected["ntp"], rel=1e-5)
    assert jepa == pytest.approx(expected["jepa"], rel=1e-5)
    assert float(total) == pytest.approx(expected["total"], rel=1e-5)
    assert float(optax.global_norm(grads)) == pytest.approx(expected["grad_norm"], rel=1e-4)
