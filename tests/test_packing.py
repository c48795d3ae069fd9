# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.data.packing import load_of, plan_rows, shuffled, slot_sizes
from llm_jepa_jax.data.views import copies, has_pair, uniform
from tests.conftest import small_config


def rows_of(plan):
    """The examples of each row."""
    return [plan.rows(row, row + 1).examples.tolist() for row in range(len(plan))]


SIZES = st.one_of(st.integers(1, 60), st.sampled_from([8, 16, 32]))  # a few of them often, so that rooms coincide
PAIRS = st.integers(0, 1) | st.integers(0, 3)
EXAMPLES = st.lists(st.tuples(SIZES, PAIRS), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(examples=EXAMPLES, seed=st.integers(0, 99), target_slots=st.integers(20, 64), pair_slots=st.integers(3, 9))
def test_every_example_once_and_no_row_over_its_limits(examples, seed, target_slots, pair_slots):
    tokens = np.array([size for size, _ in examples])
    targets, pairs = np.minimum(tokens // 2, 20), np.array([pair for _, pair in examples])
    shape = RowShape(64, target_slots, pair_slots)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(examples))
    plan = shuffled(plan_rows(order, tokens, targets, pairs, shape), rng)
    assert sorted(plan.examples.tolist()) == list(range(len(examples)))
    assert (plan.pairs == pairs[plan.examples]).all()
    for row in range(len(plan)):
        members = plan.rows(row, row + 1).examples
        assert len(members) > 0
        assert tokens[members].sum() <= shape.length
        assert targets[members].sum() <= shape.target_slots
        assert pairs[members].sum() <= shape.pair_slots


def test_best_fit_takes_the_fullest_row_that_fits():
    tokens = np.array([50, 40, 20, 10])
    zeros = np.zeros(4, np.int64)
    plan = plan_rows(np.arange(4), tokens, zeros, zeros, RowShape(64, 8, 8))
    # 50 | 40, 20 | and 10 goes to the row with 14 left, not to the one with 4
    assert rows_of(plan) == [[0, 3], [1, 2]]


def test_unpacked_rows_hold_one_example_and_large_ones_raise():
    tokens = np.array([50, 40, 20])
    zeros = np.zeros(3, np.int64)
    plan = plan_rows(np.array([2, 0, 1]), tokens, zeros, zeros, RowShape(64, 8, 8), packed=False)
    assert plan.examples.tolist() == [2, 0, 1] and len(plan) == 3
    for pairs, shape in ((zeros, RowShape(49, 8, 8)), (zeros + 2, RowShape(64, 8, 1))):
        with pytest.raises(ValueError, match="larger than a row"):
            plan_rows(np.arange(3), tokens, zeros, pairs, shape)


def test_slots_always_hold_the_largest_example():
    tokens, targets, pairs = np.array([10.0] * 50), np.array([1] * 49 + [60]), np.ones(50, int)
    shape = slot_sizes(
        load_of(tokens, targets, pairs, tokens, pairs), RowShape(128, 0, 0), packed=True, margin=1.25, num_spans=0
    )
    assert shape.target_slots >= 60 and shape.pair_slots >= 12
    several = slot_sizes(
        load_of(tokens, targets, pairs * 20, tokens, pairs), RowShape(128, 0, 0), packed=False, margin=1.25, num_spans=0
    )
    assert several.pair_slots >= 20
    given_sizes = slot_sizes(
        load_of(tokens, targets, pairs, tokens, pairs), RowShape(128, 70, 3), packed=True, margin=1.25, num_spans=0
    )
    assert dataclasses.astuple(given_sizes)[:3] == (128, 70, 3)


def test_slots_follow_the_weights_of_the_records():
    tokens, targets, pairs = np.full(100, 10.0), np.array([2] * 50 + [8] * 50), np.ones(100)
    even, towards_many = np.ones(100), np.array([1.0] * 50 + [9.0] * 50)
    sizes = [
        slot_sizes(load_of(tokens, targets, pairs, tokens, w), RowShape(640, 0, 0), True, 1.25, 0).target_slots
        for w in (even, towards_many)
    ]
    assert sizes == [400, 592]  # 1.25 · 64 examples a row · mean targets 5 and 7.4


@settings(max_examples=150, deadline=None)
@given(examples=EXAMPLES, target_slots=st.integers(1, 8), pair_slots=st.integers(3, 6))
def test_rows_are_those_of_a_search_through_all_open_rows(examples, target_slots, pair_slots):
    tokens = np.array([size for size, _ in examples])
    pairs = np.array([pair for _, pair in examples])
    most = pairs.max()
    shape = RowShape(64, target_slots, pair_slots)
    plan = plan_rows(np.arange(len(examples)), tokens, np.ones_like(tokens), pairs, shape)
    rows: list[dict] = []
    for example, (size, pair) in enumerate(examples):
        fitting = [r for r in rows if r["room"] >= size and r["pairs"] >= pair and len(r["members"]) < target_slots]
        if not fitting:
            rows.append({"room": 64, "pairs": pair_slots, "members": []})
        # of equal rooms: the fewest free pair slots that are of use, then the one used last
        best = min(fitting, key=lambda r: (r["room"], min(r["pairs"], most), -r["members"][-1]), default=rows[-1])
        best["room"] -= size
        best["pairs"] -= pair
        best["members"].append(example)
    assert rows_of(plan) == [row["members"] for row in rows]


def test_short_slots_cost_few_looks_and_no_fill():
    """Of the rows with room, most have no target slots to spare; the emptiest one still takes the example."""
    num = 400
    tokens = np.array([600 + i for i in range(num)] + [300] + [50] * 8 + [1000])  # first rooms of 424 down to 25
    targets = np.array([7] * num + [2] * 9 + [1])
    plan = plan_rows(np.arange(len(tokens)), tokens, targets, np.zeros_like(tokens), RowShape(1024, 8, 1))
    assert len(plan) == num + 4  # 18 targets in rows of 8, which the first rows' last slots cannot take, and the last
    assert rows_of(plan)[num] == [num, num + 1, num + 2, num + 3]


def test_draws_depend_on_seed_epoch_and_example_alone(tmp_path):
    config = small_config(tmp_path, objective={"jepa": {"dropout": 0.75}})
    every = np.arange(20000)
    pairs = has_pair(config, 3, every)
    assert abs(pairs.mean() - 0.25) < 0.01
    picked = np.random.default_rng(0).permutation(20000)[:100]
    assert (has_pair(config, 3, picked) == pairs[picked]).all()
    assert 0.3 < (has_pair(config, 4, every) != pairs).mean() < 0.45  # 2 · 0.25 · 0.75 where draws are independent
    other = dataclasses.replace(config, seed=1)
    assert 0.3 < (has_pair(other, 3, every) != pairs).mean() < 0.45


def test_draws_are_uniform():
    draws = uniform(0, 0, 1, np.arange(100000))
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert draws.min() >= 0 and draws.max() < 1
    assert (np.abs(counts - 5000) < 350).all()  # five standard deviations


def test_dropout_extremes_and_copies(tmp_path):
    every = np.arange(1000)
    assert not has_pair(small_config(tmp_path, objective={"jepa": {"dropout": 1.0}}), 0, every).any()
    assert not has_pair(small_config(tmp_path, objective={"jepa": {"weight": 0.0}}), 0, every).any()
    config = small_config(tmp_path)
    assert has_pair(config, 0, every).all()
    number = copies(config, 0, np.full(20000, 2.25))
    assert set(number.tolist()) == {2, 3} and abs(number.mean() - 2.25) < 0.02
