# SPDX-License-Identifier: Apache-2.0
"""Semantic tube prediction against plain loops over tokens, and which hidden states it moves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa_jax.batch import CODE_BEFORE, CODE_END, FIELDS, USER_BEFORE, USER_END, Batch
from llm_jepa_jax.data.spans import content_points, draw_spans, span_points, span_weights
from llm_jepa_jax.objective_config import ObjectiveConfig, StpConfig
from llm_jepa_jax.objectives.stp import curvatures, displacements, means, stp_sum, stp_weight
from llm_jepa_jax.objectives.term import Inputs
from tests.test_objectives import hidden_gradient, setting
from tests.test_spans import contents_of, points_of

LENGTH, WIDTH = 96, 5
HIDDEN = np.random.default_rng(0).normal(size=(1, LENGTH, WIDTH)).astype(np.float32)
TEXTS = st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(0, 5), st.integers(0, 30))


def spans_batch(points, weights):
    """One row with these span points [S, 6] and weights [S]."""
    points, weights = np.asarray(points, np.int32)[None], np.asarray(weights, np.float32)[None]
    return Batch(**dict.fromkeys(FIELDS) | {"span_points": points, "span_weight": weights})


def drawn(text, stp, epoch=0):
    """Bounds of a text, its spans and its batch."""
    points = content_points(points_of(text), stp)
    (spans,) = draw_spans(stp, 0, epoch, points, np.arange(1))
    return (
        points[0],
        spans,
        spans_batch(span_points(points[0], spans), span_weights(stp, spans, points[0])),
    )


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, epoch=st.integers(0, 99), across=st.booleans(), whole=st.booleans(), mode=st.booleans())
def test_displacements_are_sums_of_steps_inside_and_outside(text, epoch, across, whole, mode):
    """Every token of the contents is a step from the place before it."""
    stp = StpConfig(draws=1 if mode else 3, across_turns=across, whole_conversation=whole)
    if mode:
        stp = StpConfig(mode="e2e")
    points, spans, batch = drawn(text, stp, epoch)
    rest, span = displacements(HIDDEN, batch)
    places = contents_of(points)
    steps = np.array([HIDDEN[0, place] - HIDDEN[0, place - 1] for place in places]).reshape(-1, WIDTH)
    for number, (start, end) in enumerate(spans):
        inside = np.zeros(len(places), bool)
        inside[start:end] = True
        np.testing.assert_allclose(span[0, number], steps[inside].sum(0), atol=1e-5)
        np.testing.assert_allclose(rest[0, number], steps[~inside].sum(0), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(text=TEXTS)
def test_means_are_those_of_the_contents(text):
    points, _, batch = drawn(text, StpConfig(mode="mean"))
    for found, (before, end) in zip(
        means(HIDDEN, batch), ((USER_BEFORE, USER_END), (CODE_BEFORE, CODE_END)), strict=True
    ):
        states = HIDDEN[0, points[before] + 1 : points[end] + 1]
        np.testing.assert_allclose(found[0, 0], states.mean(0) if len(states) else np.zeros(WIDTH), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(text=TEXTS)
def test_curvature_is_the_mean_angle_between_steps(text):
    """Within each content: its first step has none before it."""
    points, _, batch = drawn(text, StpConfig(mode="curvature"))
    angles = []
    for before, end in ((USER_BEFORE, USER_END), (CODE_BEFORE, CODE_END)):
        steps = np.diff(HIDDEN[0, points[before] : points[end] + 1].astype(float), axis=0)
        for one, other in zip(steps[:-1], steps[1:], strict=True):
            angles.append(math.acos(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))
    found = float(curvatures(HIDDEN, batch)[0, 0])
    assert found == pytest.approx(np.mean(angles) if angles else 0.0, rel=1e-5, abs=1e-6)


def test_curvature_of_known_lines_and_its_gradient_there():
    """A straight line, equal states, a turn back: the published code's gradient is not finite on any of them."""
    _, _, batch = drawn((0, 10, 2, 10), StpConfig(mode="curvature"))
    line = np.arange(LENGTH)[None, :, None] * np.ones(WIDTH, np.float32)
    zigzag = np.where(np.arange(LENGTH) % 2, 1.0, -1.0)[None, :, None] * np.ones(WIDTH, np.float32)
    half = np.minimum(line, 5.0)  # moves, then stands still
    for states, expected in ((line, 0.0), (zigzag, np.pi), (np.ones_like(line), 0.0)):
        assert float(curvatures(states, batch)[0, 0]) == pytest.approx(expected, abs=1e-6)
    for states in (line, zigzag, np.ones_like(line), half):
        gradient = jax.grad(lambda h: curvatures(h, batch).sum())(jnp.asarray(states, jnp.float32))
        assert np.isfinite(gradient).all()


def test_descent_straightens_a_path():
    _, _, batch = drawn((0, 8, 2, 8), StpConfig(mode="curvature"))
    step = jax.jit(jax.value_and_grad(lambda h: curvatures(h, batch).sum()))
    hidden, first = jnp.asarray(HIDDEN), float(step(HIDDEN)[0])
    for _ in range(100):
        hidden = hidden - step(hidden)[1]
    assert float(step(hidden)[0]) < 0.5 * first


def test_weights_multiply_each_span_and_divide_the_sum():
    _, _, batch = drawn((1, 9, 2, 9), StpConfig(draws=3))
    config = ObjectiveConfig(stp=StpConfig(weight=1.0))

    def loss(weights):
        one = spans_batch(batch.span_points[0], weights)
        return float(stp_sum(Inputs({(1, True): HIDDEN}, None, one, config, 1)) / stp_weight(one))

    alone = [loss(np.eye(3)[i]) for i in range(3)]
    assert loss([0.5, 0.0, 2.0]) == pytest.approx((0.5 * alone[0] + 2 * alone[2]) / 2.5, rel=1e-6)


def places_of(batch, mode):
    """bool [R, L]: the hidden states that a mode reads, from the span points."""
    expected = np.zeros(batch.tokens.shape, bool)
    for row, slot in zip(*np.nonzero(batch.span_weight), strict=True):
        six = batch.span_points[row, slot]
        places = {"mean": contents_of(six), "curvature": contents_of(six), "mask": six[4:], "mask_recover": six[4:]}
        expected[row, places.get(mode, six)] = True
        if mode == "curvature":  # the first step begins before the content; alone it makes no angle
            for before, end in (six[:2], six[2:4]):
                expected[row, before] = expected[row, end] = end - before > 1
    return expected


@pytest.mark.parametrize("mode", ["random_span", "e2e", "mean", "curvature", "mask", "mask_recover"])
def test_the_term_moves_its_own_places_only(tmp_path, tokenizer, mode):
    """Not the other examples of the row, nor views or padding."""
    objective = {"stp": {"weight": 1.0, "mode": mode, "draws": 2 if mode == "random_span" else 1}}
    config, _, batch, params = setting(tmp_path, tokenizer, data={"row_length": 512}, objective=objective)
    assert batch.num_examples.max() > 1 and (batch.segments == 0).any()
    gradient = np.abs(hidden_gradient(config, batch, params, "stp")).sum(-1)
    np.testing.assert_array_equal(gradient > 0, places_of(batch, mode))
