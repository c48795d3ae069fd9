# SPDX-License-Identifier: Apache-2.0
"""Kinds of steps: row lengths, loss dropout by step, their order, and plans made ahead."""

import dataclasses
import io
import json
import pickle
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llm_jepa_jax.batch import FIELDS, Batch, check_batch
from llm_jepa_jax.config import freeze
from llm_jepa_jax.data.epochs import Epochs
from llm_jepa_jax.data.inspect import show_rows
from llm_jepa_jax.data.kinds import make_kinds
from llm_jepa_jax.data.packing import largest_first
from llm_jepa_jax.data.views import has_pair
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import global_batch
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.train.metrics import Window
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step
from tests.conftest import host_rows, plain_costs, small_config, small_data
from tests.test_pipeline import BY_STEP, KINDS, several_kinds

EPOCHS = {"train": {"num_steps": 0, "num_epochs": 3}}


@several_kinds
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_comes_once_an_epoch_with_the_pairs_drawn_for_it(tmp_path, tokenizer, sections, shuffle):
    sections = sections | EPOCHS | {"data": sections.get("data", {}) | {"shuffle": shuffle}}
    config = small_config(tmp_path, **sections)
    data = small_data(config, tokenizer)
    plans = [data.epochs.step(step)[1] for step in range(data.num_steps)]
    examples = np.concatenate([plan.examples for plan in plans])
    assert np.bincount(examples, minlength=60).tolist() == [3] * 60
    drawn = np.sum([has_pair(config, epoch, np.arange(60)) for epoch in range(3)], axis=0)
    pairs = np.concatenate([plan.pairs for plan in plans])
    assert np.bincount(examples[pairs > 0], minlength=60).tolist() == drawn.tolist()
    rows = host_rows(data)
    assert sum(int(row["num_examples"]) for row in rows) == 180
    assert sum(int(row["pair_weight"].sum()) for row in rows) == drawn.sum()


@several_kinds
def test_steps_hold_rows_of_their_kind_alone(tmp_path, tokenizer, sections):
    data = small_data(small_config(tmp_path, **sections, **EPOCHS), tokenizer)
    tokens = {kind.rows * kind.row.length for kind in data.kinds}
    assert len(tokens) == 1, "steps of every kind have equally many places"
    for step in (data.steps()[number] for number in range(data.num_steps)):
        kind = data.kinds[int(step["kind"])]
        check_batch(Batch(**{name: step[name] for name in FIELDS}), kind.rows, kind.row)
        for row in step["segments"]:
            assert np.bincount(row)[1:].max(initial=0) <= kind.row.longest_segment


def test_epochs_own_the_steps_that_end_in_them_in_a_drawn_order(tmp_path, tokenizer):
    config = small_config(tmp_path, **KINDS["both"], train={"num_steps": 60})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, rows_per_step=1, synthetic_train=300))
    data = small_data(config, tokenizer)
    epochs, orders = [data.epochs.get(epoch) for epoch in range(3)], []
    rows = np.zeros(len(data.kinds), int)
    for epoch, found in enumerate(epochs):
        before = rows // [kind.rows for kind in data.kinds]
        rows = rows + [len(plan) for plan in data.epochs.plans(epoch)]
        owned = rows // [kind.rows for kind in data.kinds] - before
        assert np.bincount(found.kind_S, minlength=len(data.kinds)).tolist() == owned.tolist()
        orders.append(found.kind_S.tolist())
    assert all(order != sorted(order) for order in orders) and orders[0][:20] != orders[1][:20]
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle=False))
    order = small_data(plain, tokenizer).epochs.get(0).kind_S.tolist()
    assert order == sorted(order) and len(set(order)) > 1


@pytest.mark.parametrize(
    ("jepa", "pairs"),
    [({"dropout": 0.0}, True), ({"dropout": 1.0}, False), ({"weight": 0.0, "dropout": 0.5}, False)],
)
def test_extremes_of_dropout_are_one_kind(tmp_path, tokenizer, jepa, pairs):
    config = small_config(tmp_path, objective={"jepa": jepa | {"dropout_by": "step"}})
    (kind,) = small_data(config, tokenizer).kinds
    assert (kind.row.pair_slots > 0) == pairs


@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_a_step_without_pairs_is_next_token_training_alone(tmp_path, tokenizer, layout):
    """Same update to the last bit as with JEPA turned off, and metrics that do not name it."""
    sections = BY_STEP | {"data": {"layout": layout}}
    config = small_config(tmp_path, **sections)
    data = small_data(config, tokenizer)
    with_pairs, without = data.kinds
    assert with_pairs.row.branch == (1 if layout == "shared" else 0) and without.row.branch == 0
    assert without.row.pair_slots == 0 and without.row.width == without.row.length
    (step,) = [s for s in (data.steps()[n] for n in range(3)) if s["kind"] == 1][:1]
    assert step["predictor_index"].shape == (8, 0)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    off = small_config(tmp_path, data={"layout": layout}, objective={"jepa": {"weight": 0.0}})
    results = []
    for run in (config, off):
        factory = state_factory(run, mesh, 4)
        with jax.set_mesh(mesh):
            train_step = make_train_step(factory, 4, without.row.longest_segment)
            results.append(train_step(factory.create(), global_batch(mesh, step)))
    (state, metrics), (other, other_metrics) = jax.device_get(results)
    assert metrics["sums"].keys() == other_metrics["sums"].keys() and "jepa_sum" not in metrics["sums"]
    assert metrics["last"]["total_loss"] == other_metrics["last"]["total_loss"] > 0
    jax.tree.map(np.testing.assert_array_equal, state.params, other.params)
    assert metrics["embeddings"][0].shape == (8, 0, 32)


def test_a_window_of_both_kinds_has_the_right_means():
    base = {"target_tokens": 10.0, "pairs": 0.0, "examples": 2.0, "tokens": 40.0, "slots": 50.0, "cos_sum": 0.0}
    plain = base | {"ntp_sum": 20.0, "ntp_weight": 10.0}
    both = base | {
        "ntp_sum": 40.0,
        "ntp_weight": 10.0,
        "pairs": 4.0,
        "cos_sum": 2.0,
        "jepa_sum": 3.0,
        "jepa_weight": 4.0,
    }
    window = Window()
    window.add(plain)
    assert window.idle_terms(["ntp", "jepa"]) == ["jepa"] and "jepa_loss" not in window.means()
    window.add(both)
    means = window.means()
    assert means["ntp_loss"] == 3.0 and means["jepa_loss"] == 0.75 and means["cos_pair"] == 0.5
    assert window.idle_terms(["ntp", "jepa"]) == [] and means["padding_share"] == pytest.approx(0.2)


LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, count=st.integers(1, 4), layout=st.sampled_from(["separate", "padded"]), dropout=st.booleans())
def test_examples_lie_in_the_shortest_rows_that_suit_them(lengths, count, layout, dropout):
    jepa = {"dropout": 0.5 * dropout, "dropout_by": "step"}
    config = freeze(
        {
            "data": {"row_length": 512, "row_buckets": count, "layout": layout, "rows_per_step": 2},
            "objective": {"jepa": jepa},
        }
    )
    conversation = np.array(lengths)
    costs = plain_costs(conversation, np.minimum(conversation, 512 - conversation), conversation - 1, conversation)
    kinds = make_kinds(config, costs, np.ones(len(lengths)))
    used = set()
    for pair in (True, False) if dropout else (True,):
        pairs = np.full(len(lengths), int(pair))
        tokens = costs.tokens(pairs)
        for size, longest, kind in zip(tokens, conversation, kinds.of(tokens, pairs), strict=True):
            needed = size if layout == "padded" else 4 * size
            shape = kinds.steps[kind].row
            suiting = [512 >> i for i in range(count) if 512 >> i >= needed] or [512]
            assert shape.length == min(suiting) and kinds.steps[kind].rows * shape.length == 1024
            assert shape.longest_segment >= longest and (shape.pair_slots > 0) == pair
            used.add(int(kind))
    assert used == set(range(len(kinds.steps))), "a kind without examples is left out"


MODEL = {"vocab_size": 512, "embed_dim": 64, "num_layers": 2, "mlp_dim": 128, "num_heads": 4, "num_kv_heads": 2}


def mixed_costs(long_share):
    """20,000 examples of 16 tokens, and a share of 400."""
    rng = np.random.default_rng(0)
    size = np.where(rng.random(20000) < long_share, 400, 16)
    return plain_costs(size // 2, size // 2, size // 4, size // 2)


@pytest.mark.parametrize(
    ("layout", "long_share", "data", "lengths"),
    [
        ("separate", 0.0, {}, [2048]),
        ("separate", 0.02, {}, [2048, 1024]),
        ("padded", 0.0, {}, [256]),
        ("padded", 0.02, {}, [512, 256]),
        ("separate", 0.02, {"target_slots": 1000}, [2048]),
    ],
)
def test_as_many_row_lengths_as_pay(layout, long_share, data, lengths):
    """Long segments make all local attention look far back; rows of their own free the short ones of it."""
    sizes = {"row_length": 2048, "rows_per_step": 4, "layout": layout}
    chosen = []
    for num_epochs in (1, 7):
        config = freeze({"data": sizes | data, "model": MODEL, "train": {"num_epochs": num_epochs}})
        kinds = make_kinds(config, mixed_costs(long_share), np.ones(20000))
        chosen.append([kind.row.length for kind in kinds.steps])
    assert chosen[0] == chosen[1]
    assert chosen[0] == lengths


def test_slots_are_sized_for_the_least_work():
    """Examples without their pair bring more targets a token: tight slots leave rows unfilled, wide ones cost time."""
    size = np.clip(np.random.default_rng(0).lognormal(5.5, 0.35, 1300).astype(int), 50, 512)
    costs = plain_costs(size, size, size * 6 // 10, size)
    slots = []
    for vocab_size in (512, 1 << 20):
        model = MODEL | {"vocab_size": vocab_size}
        jepa = {"jepa": {"dropout": 0.5}}
        config = freeze({"data": {"row_length": 1024}, "model": model, "objective": jepa})
        slots.append(make_kinds(config, costs, np.ones(1300)).steps[0].row.target_slots)
    assert slots[0] > slots[1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"row_buckets": 5}, r"`data.row_buckets`=5 halves `data.row_length`=512 below 64 tokens .*; use at most 4"),
        ({"row_length": 480, "row_buckets": 2}, "use at most 1"),  # 480, 240 is no multiple of 32
        ({"row_buckets": 2, "pair_slots": 8}, r"`data.pair_slots`=8 is for one row length, .*; use row_buckets=1"),
        ({"row_buckets": -1}, r"`data.row_buckets`=-1 must not be negative"),
        ({"prefetch": 0}, r"`data.prefetch`=0 must be above 0"),
    ],
)
def test_row_lengths_that_cannot_be_are_refused(data, words):
    with pytest.raises(UserError, match=words):
        resolve(freeze({"data": data}), {})


def test_large_examples_come_first_and_the_rest_keep_their_order():
    tokens = np.array([5, 90, 30, 10, 90, 26, 25])
    order = np.array([6, 4, 0, 2, 1, 5, 3])
    assert largest_first(order, tokens, 100).tolist() == [4, 1, 2, 5, 6, 0, 3]


def test_the_next_epoch_is_planned_while_this_one_is_read(tmp_path, tokenizer):
    data = small_data(small_config(tmp_path, train={"num_steps": 6}), tokenizer)
    fresh = pickle.loads(pickle.dumps(data.epochs))
    fresh.step(0)
    deadline = time.monotonic() + 30
    while not fresh._futures[1].done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fresh._futures[1].done() and fresh.get(1).kind_S.tolist() == data.epochs.get(1).kind_S.tolist()
    last, _ = fresh.locate(5)
    fresh.step(5)
    assert max(fresh._futures) == last, "nothing is planned behind the last step"


def test_what_goes_wrong_in_the_background_is_raised_where_the_plan_is_used(tmp_path, tokenizer):
    epochs = small_data(small_config(tmp_path), tokenizer).epochs
    costs = dataclasses.replace(epochs.costs, conversation_N=epochs.costs.conversation_N + 500)
    wrong = Epochs(small_config(tmp_path), costs, np.ones(60), epochs.kinds)
    for _ in range(2):
        with pytest.raises(ValueError, match="an example is larger than a row"):
            wrong.step(0)


def test_plans_that_were_dropped_are_made_again_alike(tmp_path, tokenizer):
    config = small_config(tmp_path, **KINDS["both"], train={"num_steps": 0, "num_epochs": 8})
    data = small_data(config, tokenizer)
    forward = [data.steps()[step] for step in range(data.num_steps)]
    backward = [data.steps()[step] for step in reversed(range(data.num_steps))][::-1]
    for one, other in zip(forward, backward, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_summary_adds_up(tmp_path, tokenizer):
    data = small_data(small_config(tmp_path, **KINDS["both"]), tokenizer)
    s = data.summary()
    assert sum(kind["examples"] for kind in s["kinds"]) == s["examples"] == 60
    assert sum(kind["rows_per_epoch"] for kind in s["kinds"]) == s["rows_per_epoch"]
    places = [kind["rows_per_epoch"] * kind["row_length"] for kind in s["kinds"]]
    assert sum(kind["fill"] * p for kind, p in zip(s["kinds"], places, strict=True)) / sum(places) == s["fill"]
    assert json.loads(json.dumps(s)) == s and len(s["kinds"]) == len(data.kinds) == 4


def test_inspection_shows_rows_of_every_kind(tmp_path, tokenizer):
    data = small_data(small_config(tmp_path, **KINDS["both"]), tokenizer)
    out = io.StringIO()
    show_rows(data, tokenizer, 1, Console(file=out, width=200))
    parts = out.getvalue().split("steps of ")[1:]
    assert [part.split(":")[0] for part in parts] == [str(kind) for kind in data.kinds]
    for part, kind in zip(parts, data.kinds, strict=True):
        assert "conversation" in part and part.count("─ row 0") == 1
        assert ("← pair 0" in part) == ("code view" in part) == (kind.row.pair_slots > 0)


def test_inspection_names_views_whichever_predicts(tmp_path, tokenizer):
    data = small_data(small_config(tmp_path, objective={"jepa": {"direction": "code_to_text"}}), tokenizer)
    out = io.StringIO()
    show_rows(data, tokenizer, 1, Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    assert any("code view" in line and "<|predictor_1|>" in line for line in lines)
    assert not any("text view" in line and "<|predictor_1|>" in line for line in lines[1:])
