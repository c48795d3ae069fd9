# SPDX-License-Identifier: Apache-2.0
"""Objectives alone against the published values, from recorded hidden states that are part of the project."""

import json
import pathlib

import numpy as np
import pytest

from llm_jepa_jax.batch import FIELDS, SPAN_BEFORE, SPAN_END, Batch
from llm_jepa_jax.data.spans import span_points, span_weights
from llm_jepa_jax.objectives.distance import cosine, predict
from llm_jepa_jax.objectives.jepa import jepa_sum, jepa_weight
from llm_jepa_jax.objectives.stp import curvatures, displacements, means, stp_sum, stp_weight
from llm_jepa_jax.objectives.term import Inputs
from tests.golden_cases import VIEWS, objective, spans_of, stp_config, two_views

DATA = pathlib.Path(__file__).parent / "data"
ARRAYS = dict(np.load(DATA / "goldens_small.npz"))
VALUES = json.loads((DATA / "goldens_small.json").read_text())
ROWS = 8


def batch_of(**fields):
    """A batch with the fields that a term reads."""
    return Batch(**dict.fromkeys(FIELDS) | fields)


def inputs_of(hidden, batch, terms):
    """One layer's states, and the recorded matrix as every term's predictor."""
    matrix = ARRAYS["linear_predictor_M"].T
    return Inputs({(1, True): hidden}, None, batch, terms, 1, predictors={"jepa": matrix, "stp": matrix})


def conversation_states():
    """[8, T, 64] hidden states, noise at padding."""
    lengths = ARRAYS["lengths"]
    used = np.arange(lengths.max() + 3) < lengths[:, None]
    hidden = np.random.default_rng(0).normal(size=(*used.shape, 64)).astype(np.float32)
    hidden[used] = ARRAYS["hidden"]
    return hidden


def embeddings(run):
    """[8, 2, 64]: the embeddings of both views as the states of a row."""
    return np.stack([ARRAYS[f"{run}/{view}_embedding"] for view in VIEWS], axis=1)


def stp_case(full_name):
    """Configuration, hidden states and batch of an STP run."""
    dataset, name = full_name.split("/", 1)
    expected = VALUES["stp"][full_name]
    stp = stp_config(name, len(expected.get("draws_start_end_full", range(ROWS))) // ROWS)
    points, spans = spans_of(ARRAYS, dataset, stp, expected.get("draws_start_end_full"))
    hidden, places = conversation_states(), np.stack([span_points(p, s) for p, s in zip(points, spans, strict=True)])
    if stp.adds_segments:
        hidden, places = embeddings(f"{dataset}/stp/{name}"), np.zeros((ROWS, 1, 6), np.int32)
        places[..., SPAN_BEFORE], places[..., SPAN_END] = 0, 1
    weights = [span_weights(stp, s, p) for s, p in zip(spans, points, strict=True)]
    return stp, hidden, batch_of(span_points=places, span_weight=np.stack(weights))


@pytest.mark.parametrize("name", VALUES["stp"])
def test_semantic_tube(name):
    stp, hidden, batch = stp_case(name)
    inputs, expected = inputs_of(hidden, batch, objective(stp=stp)), VALUES["stp"][name]
    assert float(stp_sum(inputs) / stp_weight(batch)) == pytest.approx(expected["jepa"], rel=1e-5)
    if "curvature" in expected:
        np.testing.assert_allclose(curvatures(hidden, batch)[:, 0], expected["curvature"], rtol=1e-5)
    if "cosine" in expected and not stp.adds_segments:
        source, target = (means if stp.mode == "mean" else displacements)(hidden, batch)
        source = predict("stp", source, stp, inputs.predictors)
        np.testing.assert_allclose(cosine(source, target)[:, 0], expected["cosine"], atol=2e-6)


@pytest.mark.parametrize("name", VALUES["finetune"])
def test_two_views(name):
    jepa = two_views(name.split("/", 1)[1]).jepa
    hidden = embeddings(name.rsplit("_", 1)[0] + "_cosine")
    zeros = np.zeros((ROWS, 1), np.int32)
    batch = batch_of(predictor_index=zeros, code_index=zeros + 1, pair_weight=np.ones((ROWS, 1), np.float32))
    value = jepa_sum(inputs_of(hidden, batch, objective(jepa=jepa))) / jepa_weight(batch)
    assert float(value) == pytest.approx(VALUES["finetune"][name]["jepa"], rel=1e-5)
