# SPDX-License-Identifier: Apache-2.0
import concurrent.futures
import dataclasses
import io
import json
import sys

import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from llm_jepa_jax.batch import FIELDS, RowShape, check_batch
from llm_jepa_jax.config import freeze
from llm_jepa_jax.data.cuts import Texts
from llm_jepa_jax.data.inspect import show_rows
from llm_jepa_jax.data.packing import Plan
from llm_jepa_jax.data.rows import RowBuilder
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.data.views import has_pair
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.chat import ViewTokens, render, render_view
from tests.conftest import host_batch, host_rows, plain_costs, small_config, small_data


def batches(data, step, count, process=0, processes=1):
    iterator = data.iterator(step, (process,), processes)
    out = [next(iterator) for _ in range(count)]
    iterator.close()
    return out


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("layout", ["separate", "shared", "padded"])
@pytest.mark.parametrize("targets", ["assistant", "all"])
@pytest.mark.parametrize("predictors", [0, 3])
def test_rows_say_what_the_records_say(tmp_path, tokenizer, layout, targets, predictors):
    """Every segment, position, target and pointer of two epochs, rebuilt from the records."""
    objective = {"ntp": {"targets": targets}, "jepa": {"num_predictors": predictors, "dropout": 0.5}}
    config = small_config(
        tmp_path, data={"layout": layout}, objective=objective, train={"num_steps": 0, "num_epochs": 2}
    )
    data = small_data(config, tokenizer)
    source = data_source(config)
    expected = {"conversation": {}, "pair": {}}
    for i in range(len(source)):
        rendered = render(tokenizer, source[i].messages)
        keep = rendered.assistant_target if targets == "assistant" else np.arange(len(rendered.tokens)) > 0
        expected["conversation"][tuple(rendered.tokens.tolist())] = np.flatnonzero(keep).tolist()
        (pair,) = source[i].pairs("last")
        text = render_view(tokenizer, "user", pair.text).tokens + list(tokenizer.predictor_ids[:predictors])
        expected["pair"][tuple(text)] = tuple(render_view(tokenizer, "assistant", pair.code).tokens)
    seen_conversations, seen_pairs = [], 0
    for row in host_rows(data):
        found = check_row(row if layout != "shared" else as_separate(row, predictors), expected)
        seen_conversations += found[0]
        seen_pairs += found[1]
        if layout == "padded":
            assert row["num_examples"] <= 1
    assert sorted(seen_conversations) == sorted([*expected["conversation"]] * 2)
    every = np.arange(60)
    first, second = (has_pair(config, epoch, every) for epoch in range(2))
    assert seen_pairs == first.sum() + second.sum() > 0
    (plan,) = data.epochs.plans(1)
    assert (plan.pairs == second[plan.examples]).all() and (first != second).any()


def data_source(config):
    from llm_jepa_jax.data.sources import open_splits

    return open_splits(config.data, config.seed).train


def as_separate(row, predictors):
    """A row of the shared layout with each pair's branch and what it sees as a text view before the code view."""
    length = len(row["segments"])
    out = {name: [] for name in ("tokens", "positions", "segments")}
    pairs = np.flatnonzero(row["pair_weight"])
    code_segments = {int(row["segments"][row["code_index"][pair]]): int(pair) for pair in pairs}
    moved, ends, number = {}, {}, 0

    def put(places):
        nonlocal number
        number += 1
        for place in places:
            moved.setdefault(place, len(out["tokens"]))
            for name, value in (("tokens", row["tokens"]), ("positions", row["positions"])):
                out[name].append(int(value[place]))
            out["segments"].append(number)
        return len(out["tokens"]) - 1

    for segment in range(1, int(row["segments"].max(initial=0)) + 1):
        if segment in code_segments:
            pair = code_segments[segment]
            end, first = int(row["branch_end"][pair]), length + pair * predictors
            assert row["segments"][end] == segment - 1, "a branch hangs off the conversation before its code view"
            branch = list(range(first, first + predictors))
            assert row["predictor_index"][pair] == (branch[-1] if branch else end)
            ends[pair] = put([*np.flatnonzero((row["segments"] == segment - 1) & (np.arange(length) <= end)), *branch])
        put(np.flatnonzero(row["segments"] == segment).tolist())
    free = set(range(length, len(row["tokens"]))) - {
        length + p * predictors + i for p in pairs for i in range(predictors)
    }
    assert not row["tokens"][list(free)].any() and not row["branch_end"][row["pair_weight"] == 0].any()
    used = row["target_weight"] > 0
    values = {name: np.array([*values, 0]) for name, values in out.items()}
    values["target_index"] = np.where(used, [moved.get(i, 0) for i in row["target_index"]], 0)
    values["predictor_index"] = np.array([ends.get(p, 0) for p in range(len(row["pair_weight"]))])
    values["code_index"] = np.array([moved.get(i, 0) for i in row["code_index"]])
    return row | values


def check_row(row, expected):
    """Checks one row against `expected`; its conversations and number of pairs."""
    segments, tokens = row["segments"], row["tokens"]
    count = int(segments.max(initial=0))
    places = [np.flatnonzero(segments == number) for number in range(1, count + 1)]
    assert (segments[: sum(map(len, places))] > 0).all() and not tokens[segments == 0].any()
    wanted_targets, conversations = [], []
    for place in places:
        np.testing.assert_array_equal(place, np.arange(place[0], place[-1] + 1))
        np.testing.assert_array_equal(row["positions"][place], np.arange(len(place)))
        content = tuple(tokens[place].tolist())
        if content in expected["conversation"]:
            conversations.append(content)
            wanted_targets += [place[0] + i for i in expected["conversation"][content]]
    used = row["target_weight"] > 0
    np.testing.assert_array_equal(row["target_index"][used] + 1, wanted_targets)
    np.testing.assert_array_equal(row["targets"][used], tokens[wanted_targets])
    assert row["num_examples"] == len(conversations)
    ends = {int(place[-1]): tuple(tokens[place].tolist()) for place in places}
    pairs = np.flatnonzero(row["pair_weight"])
    for pair in pairs:
        text, code = ends[int(row["predictor_index"][pair])], ends[int(row["code_index"][pair])]
        assert expected["pair"][text] == code
    assert len(places) == len(conversations) + 2 * len(pairs)
    for name in ("target_index", "targets"):
        assert not row[name][~used].any()
    return conversations, len(pairs)


BY_STEP = {"objective": {"jepa": {"dropout": 0.5, "dropout_by": "step"}}}
TWO_LENGTHS = {"data": {"row_buckets": 2, "row_length": 512}}
KINDS = {"one kind": {}, "by step": BY_STEP, "two lengths": TWO_LENGTHS, "both": BY_STEP | TWO_LENGTHS}
"""Settings that give a run one, two or four kinds of steps."""
several_kinds = pytest.mark.parametrize("sections", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("processes", [2, 4])
@several_kinds
def test_processes_hold_the_blocks_of_the_same_global_batch(tmp_path, tokenizer, processes, sections):
    data = small_data(small_config(tmp_path, **sections), tokenizer)
    whole = batches(data, 0, 4)
    parts = [batches(data, 0, 4, p, processes) for p in range(processes)]
    joined = [{name: np.concatenate([part[s][name] for part in parts]) for name in FIELDS} for s in range(4)]
    assert_same([{name: step[name] for name in FIELDS} for step in whole], joined)
    assert all(int(part[s]["kind"]) == whole[s]["kind"] for part in parts for s in range(4))


@several_kinds
def test_resumed_stream_goes_on_where_it_was(tmp_path, tokenizer, sections):
    data = small_data(small_config(tmp_path, **sections, train={"num_steps": 12}), tokenizer)  # more than one epoch
    assert data.epochs.locate(11)[0] >= 2
    whole = batches(data, 0, 12)
    fresh = small_data(data.config, tokenizer)
    assert_same(whole[7:], batches(fresh, 7, 5))
    assert len(data.kinds) == 1 or len({int(step["kind"]) for step in whole}) > 1


def test_worker_processes_give_the_same_stream(tmp_path, tokenizer):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    config = small_config(tmp_path, **KINDS["both"], train={"num_steps": 8})
    data = small_data(config, tokenizer)
    with_workers = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2, prefetch=1))
    workers = dataclasses.replace(data, config=with_workers)
    assert_same(batches(data, 3, 5), batches(workers, 3, 5))


def test_batches_keep_the_contract_and_the_tail_is_padding(tmp_path, tokenizer):
    config = small_config(tmp_path, train={"num_steps": 0, "num_epochs": 1})
    data = small_data(config, tokenizer)
    (kind,) = data.kinds
    check_batch(host_batch(data), 8, kind.row)
    all_batches = batches(data, 0, data.num_steps)
    assert sum(int(b["num_examples"].sum()) for b in all_batches) == 60
    ((_, rest),) = data.epochs.remains()
    tail = 8 - len(rest)
    assert 0 < tail < 8 and len(rest) > 0
    last = all_batches[-1]
    assert not last["segments"][-tail:].any() and not last["target_weight"][-tail:].any()
    longest = max(int((last["segments"] == s).sum(axis=1).max()) for s in range(1, 10))
    assert longest <= kind.row.longest_segment


def test_records_that_do_not_fit_are_counted_and_refused_past_the_share(tmp_path, tokenizer, caplog):
    path = tmp_path / "a.jsonl"
    lines = [{"text": f"number {i}", "code": "a" * (400 if i in (3, 7) else 1)} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train": str(path), "eval": str(path), "row_length": 64, "max_dropped_share": 0.1}
    found = small_data(small_config(tmp_path, data=data), tokenizer)
    assert found.dropped.count == 2 and found.dropped.first == (f"{path}:4", f"{path}:8")
    assert f"2 of 20 records do not fit data.row_length=64: {path}:4" in caplog.text
    assert found.summary()["examples"] == 18
    with pytest.raises(UserError, match=r"above data.max_dropped_share=9.0%; set data.row_length=\d+"):
        small_data(small_config(tmp_path, data=data | {"max_dropped_share": 0.09}), tokenizer)


@pytest.mark.parametrize(
    "sections, words",
    [
        (
            {"data": {"target_slots": 8}},
            r"`data.target_slots`=8 is below the \d+ next-token targets of synthetic:train:\d+",
        ),
        (
            {"model": {"max_positions": 16}},
            r"`model.max_positions`=16 is below the \d+ tokens in one segment of synthetic",
        ),
        ({"data": {"row_length": 8, "max_dropped_share": 1.0}}, "`data.row_length`=8 fits none of the 60 records"),
        ({"data": {"train": "synthetic*0.00001"}}, r"`data.train`=synthetic\*0.00001 leave no example"),
    ],
)
def test_sizes_that_cannot_work_name_their_key(tmp_path, tokenizer, sections, words):
    with pytest.raises(UserError, match=words):
        small_data(small_config(tmp_path, **sections), tokenizer)


def test_weights_are_copies_an_epoch(tmp_path, tokenizer):
    for name in "ab":
        lines = [json.dumps({"text": f"{name} {i}", "code": str(i) * (1 if name == "a" else 6)}) for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    spec = f"{tmp_path}/a.jsonl*2,{tmp_path}/b.jsonl*0.5"
    data = small_data(small_config(tmp_path, data={"train": spec, "eval": f"{tmp_path}/a.jsonl"}), tokenizer)
    counts = np.stack([np.bincount(data.epochs.plans(epoch)[0].examples, minlength=40) for epoch in range(40)])
    assert (counts[:, :20] == 2).all() and set(counts[:, 20:].ravel().tolist()) == {0, 1}
    assert abs(counts[:, 20:].mean() - 0.5) < 0.09  # five standard deviations
    spec = f"{tmp_path}/a.jsonl*0.5,{tmp_path}/b.jsonl*2"
    longer = small_data(small_config(tmp_path, data={"train": spec, "eval": f"{tmp_path}/a.jsonl"}), tokenizer)
    assert (
        longer.kinds[0].row.target_slots > data.kinds[0].row.target_slots
    )  # slots are sized for what the rows will hold


def test_readers_at_once_agree_on_where_epochs_begin(tmp_path, tokenizer):
    config = small_config(tmp_path, train={"num_steps": 100})
    alone = small_data(config, tokenizer).epochs
    expected = [alone.locate(step) for step in range(0, 100, 6)]
    shared = small_data(config, tokenizer).epochs
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: [shared.locate(step) for step in range(0, 100, 6)], range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert found == [expected] * 4


class FakeCorpus:
    def __init__(self, arrays, counts):
        self.arrays = arrays
        self.pair_offsets = np.cumsum([0, *counts])
        self.text_places = np.full((sum(counts), 2), -1)
        self.view_headers = np.zeros((sum(counts), 2), np.int32)

    def get(self, name, index):
        return self.arrays[name][index]


VIEW_LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=3)
RECORDS = st.lists(st.tuples(st.integers(4, 20), VIEW_LENGTHS, st.booleans()), min_size=1, max_size=9)


@settings(max_examples=80, deadline=None)
@given(records=RECORDS, predictors=st.integers(0, 10), targets=st.sampled_from(["all", "assistant"]), data=st.data())
def test_any_row_can_be_read_back(records, predictors, targets, data):
    """Any lengths, pairs, cuts and targets: the segments, in order, are the examples' token for token."""
    rng = np.random.default_rng(len(records))
    views = [view for _, lengths, _ in records for view in lengths]
    sizes = {"conversation": [r[0] for r in records]} | dict(
        zip(("text_view", "code_view"), zip(*views, strict=True) if views else ((), ()), strict=True)
    )
    arrays = {name: [rng.integers(20, 99, size).astype(np.int32) for size in sizes[name]] for name in sizes}
    # the first token has nothing before it, so it is never a target
    marks = [data.draw(st.lists(st.booleans(), min_size=r[0] - 1, max_size=r[0] - 1)) for r in records]
    arrays["assistant_target"] = [np.array([False, *mark]) for mark in marks]
    ids = tuple(range(100, 100 + predictors))
    shape = RowShape(length=1200, target_slots=260, pair_slots=27)
    counts = [len(lengths) for _, lengths, _ in records]
    corpus = FakeCorpus(arrays, counts)
    cuts = np.zeros((len(records), 2, 2), np.int32)
    for i, (length, lengths, keeps) in enumerate(records):
        if not lengths and keeps:  # plain text
            start, cut, end = sorted(data.draw(st.permutations(range(length - 1)))[:3])
            cuts[i], counts[i] = ((start, cut), (cut, end)), 1
        counts[i] *= keeps
    order = rng.permutation(len(records))
    config = freeze({"objective": {"ntp": {"targets": targets}}})
    plan = Plan(order, np.array(counts)[order], cuts[order], np.array([0, len(order)]))
    costs = dataclasses.replace(plain_costs(*[np.zeros(len(records))] * 4), texts=Texts(np.zeros(0), np.zeros(0)))
    rows = RowBuilder(corpus, config, ViewTokens(ids, (), "append"), 1, costs)(plan, 1, shape)
    row = {name: rows[name][0] for name in FIELDS}
    expected, wanted, ends, place = [], [], [], 0
    for i in order:
        text = arrays["conversation"][i].tolist()
        segments = [text]
        marked = range(1, records[i][0]) if targets == "all" else np.flatnonzero(arrays["assistant_target"][i])
        wanted += [place + int(mark) for mark in marked]
        for pair in range(corpus.pair_offsets[i], corpus.pair_offsets[i] + counts[i]):
            if cuts[i].any():
                views = [text[:1] + text[1 + start : 1 + end] for start, end in cuts[i]]
            else:
                views = [arrays["text_view"][pair].tolist(), arrays["code_view"][pair].tolist()]
            text_end = place + sum(map(len, segments)) + len(views[0]) + predictors - 1
            ends.append((text_end, text_end + len(views[1])))
            segments += [[*views[0], *ids], views[1]]
        expected += segments
        place += sum(map(len, segments))
    flat = [token for segment in expected for token in segment]
    np.testing.assert_array_equal(row["tokens"], flat + [0] * (1200 - place))
    numbers = [n for n, segment in enumerate(expected, 1) for _ in segment]
    np.testing.assert_array_equal(row["segments"], numbers + [0] * (1200 - place))
    restarts = [position for segment in expected for position in range(len(segment))]
    np.testing.assert_array_equal(row["positions"], restarts + [0] * (1200 - place))
    num, slots = len(wanted), len(ends)
    np.testing.assert_array_equal(row["target_index"][:num] + 1, wanted)
    np.testing.assert_array_equal(row["targets"][:num], row["tokens"][wanted])
    np.testing.assert_array_equal(row["predictor_index"][:slots], [text for text, _ in ends])
    np.testing.assert_array_equal(row["code_index"][:slots], [code for _, code in ends])
    assert row["target_weight"].sum() == num and row["pair_weight"].sum() == slots
    assert row["num_examples"] == len(records)
    for name in ("target_index", "targets", "target_weight"):
        assert not row[name][num:].any()
    for name in ("predictor_index", "code_index", "pair_weight"):
        assert not row[name][slots:].any()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=st.integers(0, 9), processes=st.sampled_from([1, 2, 4, 8]), dropout=st.sampled_from([0.0, 0.5]))
def test_any_process_count_from_any_step_reads_the_same_stream(tmp_path, tokenizer, step, processes, dropout):
    config = small_config(tmp_path, train={"num_steps": 10}, objective={"jepa": {"dropout": dropout}})
    whole = host_batch(small_data(config, tokenizer), step)
    fresh = small_data(config, tokenizer)
    parts = [batches(fresh, step, 1, process, processes)[0] for process in range(processes)]
    for name in FIELDS:
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), getattr(whole, name), err_msg=name)


def test_a_wrong_record_names_its_line(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "code": "b"}\n{"code": "a"}\n')
    assert len(JsonlSource(path)) == 2
    with pytest.raises(UserError, match=r"a.jsonl:2: `code` without `text`"):
        small_data(small_config(tmp_path, data={"train": str(path), "eval": str(path)}), tokenizer)


def test_a_text_view_outside_the_conversation_needs_the_separate_layout(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    path = tmp_path / "a.jsonl"
    lines = [{"messages": turns}, {"messages": turns, "text": "another", "code": "c"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"train": str(path), "eval": str(path)}
    small_data(small_config(tmp_path, data=files), tokenizer)
    with pytest.raises(UserError, match=r"a.jsonl:2: `text` is no user turn .*use data.layout=separate"):
        small_data(small_config(tmp_path, data=files | {"layout": "shared"}), tokenizer)


@pytest.mark.parametrize("view_end", ["content", "turn"])
def test_a_branch_hangs_off_the_end_of_the_text_view(tmp_path, tokenizer, view_end):
    """After a system turn and an earlier exchange too."""
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c d"), ("assistant", "e")]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    files = {"train": str(path), "eval": str(path), "layout": "shared"}
    config = small_config(tmp_path, data=files, objective={"jepa": {"view_end": view_end}})
    row = host_rows(small_data(config, tokenizer))[0]
    end = int(row["branch_end"][0])
    seen = [tokenizer.role_ids["user"], *tokenizer.encode("c d")]
    assert row["tokens"][end + 1 - len(seen) : end + 1].tolist() == seen
    branch = [tokenizer.predictor_ids[0], *([tokenizer.end_of_turn_id] if view_end == "turn" else [])]
    assert row["tokens"][256 : 256 + len(branch)].tolist() == branch
    assert row["predictor_index"][0] == 255 + len(branch)
    assert row["positions"][row["predictor_index"][0]] == end + len(branch)


@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_inspection_shows_views_and_fill(tmp_path, tokenizer, layout):
    data = small_data(small_config(tmp_path, data={"layout": layout}), tokenizer)
    out = io.StringIO()
    show_rows(data, tokenizer, 1, Console(file=out, width=200))
    text = out.getvalue()
    for words in (
        {"separate": "text view", "shared": "branch"}[layout],
        "code view",
        "<|predictor_1|>",
        "← pair 0",
        "padding",
        f"fill {data.summary()['fill']:.1%}",
    ):
        assert words in text, words
