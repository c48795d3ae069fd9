# SPDX-License-Identifier: Apache-2.0
"""Distances, SIGReg and schedules against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.objective_config import SigregConfig, TermConfig, VectorsConfig
from llm_jepa_jax.objectives.distance import distance_sum, length, predict
from llm_jepa_jax.objectives.sigreg import epps_pulley
from llm_jepa_jax.objectives.term import scale

DISTANCES = ("cosine", "l2", "mse", "infonce")
SOURCE, TARGET = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
WEIGHT = np.array([[1, 0.5, 0, 2], [0, 0, 0, 0], [1, 1, 0, 0.25]], np.float32)
TEMPERATURE = 0.3


def normal_samples(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def plain(distance, source, target, weight):
    """The distances of used slots one by one."""
    used = weight > 0
    s, t, w = (array[used].astype(np.float64) for array in (source, target, weight))
    if distance == "cosine":
        each = 1 - (unit(s) * unit(t)).sum(-1)
    elif distance == "l2":
        each = np.sqrt(((s - t) ** 2).sum(-1))
    elif distance == "mse":
        each = ((s - t) ** 2).mean(-1)
    else:
        scores = np.exp(unit(s) @ unit(t).T / TEMPERATURE)
        each = -np.log(np.diag(scores) / scores.sum(1))
    return (each * w).sum()


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_are_the_plain_formulas_of_used_slots(distance):
    config = VectorsConfig(distance=distance, temperature=TEMPERATURE)
    found = distance_sum(SOURCE, TARGET, WEIGHT, config)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(plain(distance, SOURCE, TARGET, WEIGHT), rel=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_free_slots_change_nothing(distance):
    """Neither the sum nor any gradient; their own gradient is 0."""
    config = VectorsConfig(distance=distance, temperature=TEMPERATURE)
    run = jax.value_and_grad(lambda s, t: distance_sum(s, t, WEIGHT, config), (0, 1))
    free = (WEIGHT == 0)[..., None]
    value, grads = run(SOURCE, TARGET)
    other, other_grads = run(np.where(free, 7.0, SOURCE), np.where(free, np.float32(0.0), TARGET))
    np.testing.assert_array_equal(other, value)
    for one, two in zip(grads, other_grads, strict=True):
        np.testing.assert_array_equal(one, two)
        assert not np.asarray(one)[free[..., 0]].any() and np.asarray(one)[~free[..., 0]].any()


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_are_finite_at_zero_and_equal_vectors(distance):
    zero, same = np.zeros_like(SOURCE), SOURCE
    config = VectorsConfig(distance=distance)
    for source, target in ((zero, zero), (zero, same), (same, zero), (same, same), (same, -same)):
        value, grads = jax.value_and_grad(lambda s, t: distance_sum(s, t, WEIGHT, config), (0, 1))(source, target)
        assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads)
    if distance != "infonce":
        assert float(distance_sum(same, same, WEIGHT, config)) == pytest.approx(0.0, abs=1e-5)


def test_length_and_its_gradient():
    np.testing.assert_allclose(length(jnp.array([[3.0, 4.0], [0.0, 0.0]])), [5.0, 0.0])
    gradient = jax.grad(lambda x: length(x).sum())(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_infonce_falls_when_own_targets_come_nearer_than_others():
    config = VectorsConfig(distance="infonce", temperature=TEMPERATURE)
    ones = np.ones((3, 4), np.float32)
    apart = np.eye(12, dtype=np.float32).reshape(3, 4, 12)
    nats = float(distance_sum(apart, np.ones_like(apart), ones, config)) / 12
    assert nats == pytest.approx(np.log(12), rel=1e-5)  # a constant target cannot be told from others
    assert float(distance_sum(apart, apart, ones, config)) / 12 < 0.5
    assert float(distance_sum(apart, np.roll(apart, 1, axis=1), ones, config)) / 12 > nats


def test_the_learned_matrix_is_applied_to_the_source():
    matrix = normal_samples(8, 8)
    linear = VectorsConfig(linear_predictor=True)
    np.testing.assert_allclose(predict("a", SOURCE, linear, {"a": matrix, "b": 2 * matrix}), SOURCE @ matrix, rtol=1e-4)
    np.testing.assert_array_equal(predict("a", SOURCE, VectorsConfig(), {}), SOURCE)


SIGREG = SigregConfig()


def integral(values, config):
    """N ∫ |φ − φ_normal|² exp(−t²/2) over −reach to reach, on the same points."""
    points = np.linspace(0.0, config.reach, config.knots)
    points = np.concatenate([-points[:0:-1], points])
    empirical = np.exp(1j * points[:, None] * values).mean(1)
    normal = np.exp(-(points**2) / 2)
    return len(values) * np.trapezoid(np.abs(empirical - normal) ** 2 * normal, points)


@pytest.mark.parametrize("config", [SIGREG, SigregConfig(knots=5, reach=1.5), SigregConfig(knots=2)])
def test_epps_pulley_is_the_integral_over_used_slots(config):
    values = normal_samples(20, 3) * [0.5, 1.0, 3.0] + [0.0, 0.0, 1.0]
    weight = (np.arange(20) % 3 > 0).astype(np.float32)
    used = weight > 0
    expected = [integral(values[used, column].astype(np.float64), config) for column in range(3)]
    np.testing.assert_allclose(epps_pulley(values, weight, config), expected, rtol=1e-4)
    noise = np.where(used[:, None], values, 1e3)
    np.testing.assert_allclose(epps_pulley(noise, weight, config), expected, rtol=1e-4)


def test_epps_pulley_tells_normal_samples_from_others():
    """Of normal samples about 1.06 is expected, whatever their number."""
    normal = normal_samples(2000, 1)
    ones = np.ones(2000, np.float32)
    others = (normal * 0, normal * 3, normal * 0.3, normal + 1, np.sign(normal))
    small = epps_pulley(normal, ones, SIGREG)[0]
    assert small < 4.0 and all(epps_pulley(other, ones, SIGREG)[0] > 50 for other in others)
    assert not epps_pulley(normal, 0 * ones, SIGREG).any()


def test_descent_makes_a_collapsed_set_normal():
    start = jnp.asarray(0.1 * normal_samples(200, 1) + 0.5)
    run = jax.jit(jax.value_and_grad(lambda x: epps_pulley(x, jnp.ones(200), SIGREG).sum()))
    values, first = start, float(run(start)[0])
    last = first
    for _ in range(200):
        value, gradient = run(values)
        assert float(value) <= last + 1e-4
        last, values = float(value), values - 0.3 * gradient
    assert last < 0.05 * first
    assert abs(float(values.mean())) < 0.1 and float(values.std()) > 0.8


def test_schedules_rise_from_the_first_step_to_the_last():
    rising = TermConfig(weight=2.0, schedule="linear", min_weight=0.5)
    assert [float(scale(rising, step, 4)) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    shorter = dataclasses.replace(rising, schedule_steps=3)
    assert [float(scale(shorter, step, 10)) for step in (0, 1, 2, 3, 9)] == pytest.approx([0.5, 1.25, 2.0, 2.0, 2.0])
    assert float(scale(rising, 0, 1)) == 0.5  # a run of one step (the published code divides by zero)
    assert [scale(TermConfig(weight=2.0), step, 4) for step in (0, 3)] == [2.0, 2.0]
    traced = jax.jit(lambda step: scale(rising, step, 4))(jnp.int32(3))
    assert float(traced) == 2.0
