# SPDX-License-Identifier: Apache-2.0
"""Epochs of several windows: nothing is lost or comes twice, draws are those of one, the stream is entered anywhere."""

import json
import pickle

import numpy as np
import pytest

from llm_jepa_jax.data import kinds
from llm_jepa_jax.data.kinds import num_windows
from llm_jepa_jax.data.views import copies
from tests.conftest import small_config, small_data

CASES = {
    "pairs": {},
    "no shuffle": {"data": {"shuffle": False}},
    "apart, two lengths": {
        "data": {"row_buckets": 2, "row_length": 512},
        "objective": {"jepa": {"dropout": 0.5, "dropout_by": "step"}},
    },
    "spans, one example a row": {
        "data": {"layout": "padded"},
        "objective": {"stp": {"weight": 1.0, "draws": 2}},
    },
    "texts, weights": {"data": {"train": "texts.jsonl*1.5", "eval": "texts.jsonl", "text_views": "adjacent"}},
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def config(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"Day {i}. It is warm, and so on. " * (1 + i % 3)}) for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return small_config(tmp_path, **request.param, train={"num_steps": 0, "num_epochs": 2})


@pytest.fixture
def both(config, tokenizer, monkeypatch):
    """The data in one window an epoch, and in several."""
    whole = small_data(config, tokenizer)
    monkeypatch.setattr(kinds, "WINDOW", 16)
    return whole, small_data(config, tokenizer)


def examples_of(plans):
    """(id, pairs, drawn spans) of every example in them."""
    return sorted(
        (int(example), int(pairs), drawn.tolist())
        for plan in plans
        for example, pairs, drawn in zip(plan.examples, plan.pairs, plan.drawn, strict=True)
    )


def test_windows_hold_the_epoch_with_what_is_drawn_for_it(both):
    whole, parts = both
    assert whole.epochs.windows == 1 and parts.epochs.windows == 4
    assert whole.kinds == parts.kinds and whole.kinds[0].row == parts.kinds[0].row
    for epoch in range(2):
        windows = [parts.epochs.plans(4 * epoch + window) for window in range(4)]
        assert examples_of(plan for plans in windows for plan in plans) == examples_of(whole.epochs.plans(epoch))
        sizes = [sum(len(plan.examples) for plan in plans) for plans in windows]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= 16


def test_without_shuffling_windows_follow_the_order_of_the_file(config, both):
    ids = np.concatenate([np.sort(both[1].epochs.plans(window)[0].examples) for window in range(4)])
    assert (np.diff(ids) >= 0).all() == (not config.data.shuffle)


def test_every_example_is_trained_on_in_whole_steps(both):
    whole, parts = both
    seen = sum(int(parts.steps()[step]["num_examples"].sum()) for step in range(parts.num_steps))
    weights_N = np.where(parts.fits_N, 1.5 if "*" in parts.config.data.train else 1.0, 0.0)
    assert seen == sum(int(copies(parts.config, epoch, weights_N).sum()) for epoch in range(2))
    ends = [parts.epochs.end(window) for window in range(8)]
    assert parts.num_steps == ends[-1] + len(parts.epochs.remains()) and ends == sorted(ends)
    tail = sum(len(plan) for _, plan in parts.epochs.remains())
    rows = sum(len(plan) for window in range(8) for plan in parts.epochs.plans(window))
    steps = [parts.kinds[parts.epochs.step(step)[0]].rows for step in range(ends[-1])]
    assert sum(steps) + tail == rows, "a step holds rows of two windows rather than padding"
    assert abs(parts.summary()["examples"] - whole.summary()["examples"]) <= 4


def test_the_stream_is_entered_anywhere(both):
    """A restart, and a worker's copy, see the steps that a run left alone sees."""
    _, parts = both
    alone = [parts.steps()[step] for step in range(parts.num_steps)]
    for first in (parts.num_steps - 1, parts.num_steps // 2, 1):
        fresh = pickle.loads(pickle.dumps(parts.steps()))
        for step in (first, max(0, first - 1)):
            for name, array in fresh[step].items():
                np.testing.assert_array_equal(array, alone[step][name])


def test_most_epochs_are_one_window():
    assert [num_windows(np.ones(n)) for n in (1, 1 << 20)] == [1, 1]
    assert num_windows(np.full(1 << 20, 1.5)) == 2
