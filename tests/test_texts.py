# SPDX-License-Identifier: Apache-2.0
"""Plain text, groups of paraphrases and several pairs: views beyond one pair of a conversation."""

import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.data.cuts import Texts, draw_cuts, most_cut, sentence_bounds
from llm_jepa_jax.data.inspect import show_rows
from llm_jepa_jax.data.packing import Plan
from llm_jepa_jax.data.sources import JsonlSource, open_splits
from llm_jepa_jax.data.views import branch_size, has_pair
from llm_jepa_jax.errors import UserError
from tests.conftest import host_rows, small_config, small_data
from tests.test_views import ALLOWED

HOW = ("continuation", "adjacent", "sentence")
STORY = "It rained. We stayed in, all day! Why not? The dog slept.\n\nThen it was night."


def turns(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"train": str(path), "eval": str(path)}


def data_of(tmp_path, tokenizer, records, objective=None, epochs=2, **data):
    files = write(tmp_path / "a.jsonl", records)
    config = small_config(
        tmp_path, data=files | data, objective=objective or {}, train={"num_steps": 0, "num_epochs": epochs}
    )
    return small_data(config, tokenizer)


CONTENT = st.text("ab. 1\n", min_size=1, max_size=12).filter(str.strip)
CONVERSATION = st.lists(CONTENT, min_size=2, max_size=6).map(lambda texts: texts[: len(texts) // 2 * 2])
RECORD = st.one_of(
    CONVERSATION.map(lambda texts: {"messages": turns(*texts)}),
    st.builds(
        # a text view that is a user turn, as the shared layout needs
        lambda texts, codes: {
            "messages": turns(*texts),
            "pairs": [{"text": texts[2 * i % len(texts)], "code": code} for i, code in enumerate(codes)],
        },
        CONVERSATION,
        st.lists(CONTENT, min_size=1, max_size=3),
    ),
    st.lists(CONTENT, min_size=2, max_size=4).map(lambda texts: {"group": texts}),
    st.text("ab. 1\n", min_size=1, max_size=60).filter(str.strip).map(lambda text: {"text": text}),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(ALLOWED), predictors=st.integers(0, 10), view_end=st.sampled_from(["content", "turn"]),
    records=st.lists(RECORD, min_size=1, max_size=4), pairs=st.sampled_from(["last", "turns"]),
    how=st.sampled_from(HOW), mode=st.sampled_from(["random_span", "mask", "mask_recover"]), epoch=st.integers(0, 3),
)  # fmt: skip
def test_costs_are_the_tokens_laid(tmp_path, tokenizer, case, predictors, view_end, records, pairs, how, mode, epoch):
    """Tokens, targets, pairs and the longest segment of every kind of record, as the epoch draws them."""
    layout, direction, placement = case
    jepa = {"direction": direction, "placement": placement, "num_predictors": predictors, "view_end": view_end}
    unread = layout == "shared" and view_end == "turn" and (direction == "code_to_text" or not predictors)
    assume(not unread or not any(set(record) == {"text"} for record in records))
    objective = {"jepa": jepa, "stp": {"weight": 1.0, "mode": mode}}
    data = data_of(tmp_path, tokenizer, records, objective, layout=layout, pairs=pairs, text_views=how, row_length=512)
    costs, branch = data.epochs.costs, branch_size(data.config)
    drawn = costs.draw(0, epoch, np.arange(len(costs.pairs_N)))
    shape = RowShape(512, 512, 8, branch=branch, span_slots=1)
    for example in range(len(costs.pairs_N)):
        for count in {0, int(costs.pairs_N[example])}:
            plan = Plan(np.array([example]), np.array([count]), drawn[[example]], np.array([0, 1]))
            row = {name: array[0] for name, array in data.builder(plan, 1, shape).items()}
            lengths, counts_N = np.bincount(row["segments"])[1:], np.where(costs.pairs_N, count, 0)
            assert lengths.sum() == costs.tokens(counts_N, drawn)[example] <= costs.tokens(counts_N)[example]
            assert lengths.max() <= costs.longest_N[example]
            assert row["target_weight"].sum() == costs.targets_N[example] and row["pair_weight"].sum() == count
            assert np.count_nonzero(row["tokens"][512:]) == branch * count
            assert data.epochs.tokens(plan) == lengths.sum() + branch * count


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab.!?\n é😀", min_size=1, max_size=40))
def test_sentences_begin_where_the_decoded_text_says(tokenizer, text):
    ids, places = tokenizer.encode_with_places(text)
    assert ids == tokenizer.encode(text)
    bounds = sentence_bounds(text, places)
    assert bounds[0] == 0 and bounds[-1] == len(ids) and (np.diff(bounds) > 0).all()
    found, begun = [], 0
    for end in range(1, len(text)):  # every place between two characters, one by one
        if text[end - 1] in ".!?\n" and text[end] in " \n" and text[begun:end].strip() and text[end:].strip():
            found.append(text[:end])
            begun = end
    assert [tokenizer.decode(ids[:bound]) for bound in bounds[1:-1]] == found


def test_a_token_over_the_end_of_a_sentence_goes_with_it():
    """Tokens as other tokenizers have them: one of `.` and a newline, and one that also holds the next letter."""
    assert sentence_bounds("a.\nb", [0, 1, 3]) == [0, 2, 3]
    assert sentence_bounds("a.\nb. c", [0, 1, 4, 5]) == [0, 3, 4]
    assert sentence_bounds("a. é", [0, 1, 3, 3]) == [0, 2, 4], "é as two bytes, which both begin with it"


BOUNDS = st.lists(st.lists(st.integers(1, 6), max_size=5), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(sizes=BOUNDS, how=st.sampled_from(HOW))
def test_cuts_are_neighbours_within_what_was_planned(sizes, how):
    """Sentences of so many tokens each; an example without any is a conversation."""
    bounds = [np.cumsum([0, *sentences]) if sentences else np.zeros(0) for sentences in sizes]
    texts = Texts(np.concatenate(bounds).astype(np.int32), np.cumsum([0, *map(len, bounds)]))
    most, longest = most_cut(how, texts), np.zeros((len(sizes), 3), int)
    for epoch in range(40):
        cuts = draw_cuts(how, 7, epoch, texts, np.arange(len(sizes)))
        some = np.arange(len(sizes))[::-2]
        np.testing.assert_array_equal(cuts[some], draw_cuts(how, 7, epoch, texts, some))
        for (start, cut), (again, end), bound, cuttable in zip(
            *cuts.transpose(1, 0, 2), bounds, texts.can_be_cut(how), strict=True
        ):
            assert cuttable == (len(bound) > 2 if how == "sentence" else len(bound) > 0 and bound[-1] > 1)
            if not cuttable:
                assert start == cut == again == end == 0
                continue
            assert 0 <= start < cut == again < end <= bound[-1]
            if how == "continuation":
                assert start == 0 and end == bound[-1]
            elif how == "adjacent":
                assert cut - start == end - cut
            else:
                place = bound.tolist().index(cut)
                assert bound[place - 1 : place + 2].tolist() == [start, cut, end]
        both = cuts[..., 1] - cuts[..., 0]
        longest = np.maximum(longest, np.column_stack([both, both.sum(axis=1)]))
    assert (longest <= most).all() and ((most > 0) == (longest > 0)).all()
    if how == "sentence":
        assert (longest == most).all(), "40 epochs take every one of up to 4 cuts"


@pytest.mark.parametrize("how", HOW)
def test_cuts_are_uniform_and_new_in_every_epoch(how):
    texts = Texts(np.tile([0, 3, 5, 9, 10], 4000).astype(np.int32), np.arange(4001) * 5)
    ids = np.arange(4000)
    cuts, other = draw_cuts(how, 0, 0, texts, ids), draw_cuts(how, 0, 1, texts, ids)
    places = np.bincount(cuts[:, 1, 0], minlength=10)
    allowed = [3, 5, 9] if how == "sentence" else range(1, 10)
    assert places.sum() == places[list(allowed)].sum()
    expected = 4000 / len(allowed)
    assert (np.abs(places[list(allowed)] - expected) < 5 * expected**0.5).all()
    assert (cuts[:, 1, 0] != other[:, 1, 0]).mean() > 0.6 and (
        cuts[:, 1, 0] != draw_cuts(how, 1, 0, texts, ids)[:, 1, 0]
    ).any()
    if how == "adjacent":
        sizes = (cuts[:, 1, 1] - cuts[:, 1, 0])[cuts[:, 1, 0] == 5]
        assert (np.abs(np.bincount(sizes, minlength=6)[1:] - len(sizes) / 5) < 5 * (len(sizes) / 5) ** 0.5).all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("direction", ["text_to_code", "code_to_text"])
def test_views_of_plain_text_are_its_own_words(tmp_path, tokenizer, how, direction):
    """Every pair of rows decodes to neighbouring parts of its text; all tokens of the text are targets."""
    records = [{"text": f"{i}. {STORY}"} for i in range(12)] + [{"messages": turns("q", "a")}]
    data, again = (
        data_of(tmp_path, tokenizer, records, {"jepa": {"direction": direction}}, epochs=3, text_views=how)
        for _ in range(2)
    )
    found = []
    for row in host_rows(data):
        segments, used = row["segments"], row["pair_weight"] > 0
        words = {number: row["tokens"][segments == number] for number in range(1, segments.max() + 1)}
        for ends in zip(row["predictor_index"][used], row["code_index"][used], strict=True):
            first, second = (words[segments[end]] for end in ends)
            if first[1] in tokenizer.role_ids.values():
                continue
            assert first[-1] == tokenizer.predictor_ids[0]
            earlier, later = (first, second) if direction == "text_to_code" else (second, first)
            text = words[min(segments[end] for end in ends) - 1]
            assert text[-1] == tokenizer.end_of_turn_id
            text, earlier, later = (tokenizer.decode(ids) for ids in (text, earlier, later))
            assert earlier + later in text
            if how == "continuation":
                assert earlier + later == text
            elif how == "sentence":
                assert earlier.rstrip()[-1] in ".!?"
            found.append((text, earlier))
    assert len(found) == 36 and len(set(found)) > 24, "another cut in another epoch"
    resumed, last = pickle.loads(pickle.dumps(again.steps())), data.num_steps - 1
    np.testing.assert_array_equal(resumed[last]["tokens"], data.steps()[last]["tokens"])
    targets = sum(row["target_weight"].sum() for row in host_rows(data))
    size = sum(len(tokenizer.encode(record["text"])) + 1 for record in records[:-1]) + len(tokenizer.encode("a")) + 1
    assert targets == 3 * size


@pytest.mark.parametrize("view_end", ["content", "turn"])
def test_shared_reads_the_earlier_view_inside_the_text(tmp_path, tokenizer, view_end):
    objective = {"jepa": {"view_end": view_end, "num_predictors": 2}}
    data = data_of(tmp_path, tokenizer, [{"text": STORY}], objective, epochs=3, layout="shared")
    end = [tokenizer.end_of_turn_id] if view_end == "turn" else []
    for row, epoch in zip(host_rows(data)[:3], range(3), strict=True):
        (_, cut), (_, last) = data.epochs.costs.draw(0, epoch, np.arange(1))[0]
        assert row["branch_end"][0] == cut and row["predictor_start"][0] == 0 and row["segments"].max() == 2
        ids = tokenizer.encode(STORY)
        assert row["tokens"][:256][row["segments"] == 2].tolist() == [tokenizer.bos_id, *ids[cut:last], *end]
        branch = [*tokenizer.predictor_ids[:2], *end]
        assert row["tokens"][256 : 256 + len(branch)].tolist() == branch
        assert row["positions"][256 : 256 + len(branch)].tolist() == list(range(cut + 1, cut + 1 + len(branch)))
        assert row["predictor_index"][0] == 255 + len(branch)


def test_texts_without_a_pair_are_counted_and_trained_on(tmp_path, tokenizer, caplog):
    records = [{"text": STORY}, {"text": "No end"}, {"text": "One."}, {"text": "a"}, {"messages": turns("q", "a")}]
    by_step = {"jepa": {"dropout_by": "step"}}
    data = data_of(tmp_path, tokenizer, records, by_step, epochs=1, text_views="sentence")
    assert "3 of 4 plain texts have fewer than 2 sentences: no JEPA pair" in caplog.text
    assert data.summary()["pairs"] == 2 and [kind.row.pair_slots > 0 for kind in data.kinds] == [True, False]
    rows = host_rows(data)
    assert sum(row["num_examples"] for row in rows) == 5 and sum(row["pair_weight"].sum() for row in rows) == 2
    data_of(tmp_path, tokenizer, records, epochs=1)
    assert "1 of 4 plain texts have fewer than 2 tokens: no JEPA pair" in caplog.text


@pytest.mark.parametrize("mode", ["random_span", "curvature", "e2e", "mean", "mask"])
def test_spans_of_plain_text_lie_in_it(tmp_path, tokenizer, mode, caplog):
    stp = {"jepa": {"weight": 0.0}, "stp": {"weight": 1.0, "mode": mode}}
    data = data_of(tmp_path, tokenizer, [{"text": STORY}, {"messages": turns("how so", "like this")}], stp, epochs=1)
    size, weights = len(tokenizer.encode(STORY)), []
    for row in host_rows(data):
        text = np.flatnonzero(row["tokens"][row["target_index"]] == tokenizer.bos_id)
        for points, weight in zip(row["span_points"], row["span_weight"], strict=True):
            if weight and mode != "mask" and len(text) and points[1] - points[0] == size:
                assert points[1] == points[2] == points[3] and points[0] <= points[4] <= points[5] <= points[1]
        weights += row["span_weight"][row["span_weight"] > 0].tolist()
    assert len(weights) == (1 if mode in ("e2e", "mean") else 2)
    warned = f"1 of 2 examples have no assistant turn for objective.stp.mode={mode}: no STP term" in caplog.text
    assert warned == (mode in ("e2e", "mean"))


def test_a_group_is_a_chain_of_pairs(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    files = write(path, [{"text": "t", "code": "c"}, {"group": ["one", "two", "three"]}, {"group": ["x", "y"]}])
    source = JsonlSource(path)
    said = [[message.content for message in source[i].messages] for i in range(len(source))]
    assert said == [["t", "c"], ["one", "two"], ["two", "three"], ["x", "y"]]
    assert [tuple(source[i].pairs("last")[0]) for i in (1, 2)] == [("one", "two", 0), ("two", "three", 0)]
    assert [source.location(i) for i in range(4)] == [
        f"{path}:1", f"{path}:2, members 1 and 2", f"{path}:2, members 2 and 3", f"{path}:3, members 1 and 2",
    ]  # fmt: skip
    data = small_data(small_config(tmp_path, data=files | {"layout": "shared"}), tokenizer)
    assert data.summary()["examples"] == data.summary()["pairs"] == 4
    write(path, [{"group": [f"{i} {j}" for j in range(5)]} for i in range(20)])
    splits = open_splits(small_config(tmp_path, data=files | {"eval": "", "eval_share": 0.2}).data, 0)
    first = [
        {split[i].messages[0].content.split()[0] for i in range(len(split))} for split in (splits.train, splits.eval)
    ]
    assert len(splits.eval) == 16 and len(splits.train) == 64 and not first[0] & first[1], "held out group by group"


def test_all_pairs_of_an_example_come_or_go_together(tmp_path, tokenizer):
    """Both ways to have several, in one file; row lengths and loss dropout by step too."""
    records = []
    for i in range(30):
        records.append({"messages": turns(f"a {i}", "b", f"c {i}", "d", f"e {i}", "f")})
        records.append(
            {"messages": turns(f"g {i}", "h"), "pairs": [{"text": f"t {i} {j}", "code": "c"} for j in range(4)]}
        )
    expected = {f"{name} {i}": (f"{name} {i}", code) for i in range(30) for name, code in ("ab", "cd", "ef")}
    expected |= {f"t {i} {j}": (f"t {i} {j}", "c") for i in range(30) for j in range(4)}
    jepa = {"dropout": 0.5, "dropout_by": "step", "num_predictors": 0}
    data = data_of(tmp_path, tokenizer, records, {"jepa": jepa}, pairs="turns", row_length=512, row_buckets=2)
    keeps = [has_pair(data.config, epoch, np.arange(60)) for epoch in range(2)]
    seen = []
    for row in host_rows(data):
        for pair in np.flatnonzero(row["pair_weight"]):
            ends = [row["segments"][row[name][pair]] for name in ("predictor_index", "code_index")]
            texts = tuple(
                tokenizer.decode(row["tokens"][: len(row["segments"])][row["segments"] == end]) for end in ends
            )
            assert texts == expected[texts[0]]
            seen.append(texts[0])
    counts = {example: sum(int(keep[example]) for keep in keeps) for example in range(60)}
    for i in range(30):
        for names, example in (([f"{n} {i}" for n in "ace"], 2 * i), ([f"t {i} {j}" for j in range(4)], 2 * i + 1)):
            assert [seen.count(name) for name in names] == [counts[example]] * len(names)
    last = data_of(tmp_path, tokenizer, records[::2], epochs=1)
    assert last.summary()["pairs"] == 30


def test_shared_reads_each_text_in_its_own_turn(tmp_path, tokenizer):
    """Also where another turn says the same; a text that is named is read in the last turn that says it."""
    conversation = {"messages": turns("yes", "a", "no", "b", "yes", "c")}
    named = conversation | {"pairs": [{"text": "no", "code": "d"}, {"text": "yes", "code": "e"}]}
    for record, contents in ((conversation, [0, 1, 2]), (named, [1, 2])):
        data = data_of(tmp_path, tokenizer, [record], epochs=1, layout="shared", pairs="turns")
        row, places = host_rows(data)[0], []
        yes, no = tokenizer.encode("yes"), tokenizer.encode("no")
        end = 0
        for content, answer in ((yes, "a"), (no, "b"), (yes, "c")):
            places.append(end + 1 + len(content))
            end += len(content) + len(tokenizer.encode(answer)) + 4
        assert row["branch_end"][row["pair_weight"] > 0].tolist() == [places[i] for i in contents]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"group": ["a"]}, "`group` must be a list of two paraphrases or more"),
        ({"group": "ab"}, "`group` must be a list of two paraphrases or more"),
        ({"group": ["a", 3]}, r"`group\[1\]` is int; it must be a string"),
        ({"group": ["a", " "]}, r"`group\[1\]` is empty"),
        ({"group": ["a", "b"], "text": "c"}, "`group` beside `text`; a group of paraphrases is a line of its own"),
        ({"text": " "}, "`text` is empty"),
        ({"messages": turns("a", "b"), "pairs": []}, "`pairs` must be a list of"),
        ({"messages": turns("a", "b"), "pairs": [{"text": "a"}]}, r"`pairs\[0\]` must be .*, nothing more or less"),
        ({"messages": turns("a", "b"), "pairs": [{"text": "a", "code": ""}]}, r"`pairs\[0\].code` is empty"),
        ({"messages": turns("a", "b"), "pairs": [1], "text": "a"}, "`pairs` beside `text`; `pairs` comes in place of"),
        ({"messages": turns("a", "b"), "text": "a"}, "`text` without `code`"),
        ({"pairs": [{"text": "a", "code": "b"}]}, "`pairs` without `messages`"),
    ],
)
def test_wrong_records_name_their_line(tmp_path, record, words):
    write(tmp_path / "a.jsonl", [{"text": "a"}, record])
    with pytest.raises(UserError, match=r"a.jsonl:2: " + words) as caught:
        JsonlSource(tmp_path / "a.jsonl")[1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "changes", "words"),
    [
        (
            {"messages": turns("a", "b"), "pairs": [{"text": "a", "code": "b"}, {"text": "c", "code": "b"}]},
            {"layout": "shared"},
            r"a.jsonl:2: `text` is no user turn \(so in 1 of 2 records\).* use data.layout=separate",
        ),
        (
            {"text": STORY},
            {"layout": "shared", "jepa": {"view_end": "turn", "direction": "code_to_text"}},
            r"a.jsonl:2: plain text has no end-of-turn token at a cut.* use view_end=content, or data.layout=separate",
        ),
        (
            {"messages": turns(*"abcdef")},
            {"pairs": "turns", "pair_slots": 2},
            r"`data.pair_slots`=2 is below the 3 pairs of .*a.jsonl:2; raise it to that",
        ),
        (
            {"text": STORY},
            {"jepa": {"view_end_offset": 2, "num_predictors": 0}},
            r"`objective.jepa.view_end_offset`=2 lies before the 2 tokens of the text view of .*a.jsonl:2; use",
        ),
        (
            {"group": ["a", "b " * 400]},
            {"max_dropped_share": 0.1},
            r"1 of 2 records do not fit data.row_length=256: .*a.jsonl:2, members 1 and 2; that is",
        ),
    ],
)
def test_what_cannot_be_laid_out_names_its_line(tmp_path, tokenizer, record, changes, words):
    changes = dict(changes)
    objective = {"jepa": changes.pop("jepa", {})}
    with pytest.raises(UserError, match=words):
        data_of(tmp_path, tokenizer, [{"text": "abc abc", "code": "cba cba"}, record], objective, **changes)


def test_a_key_with_escapes_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"\\u0067roup": ["a", "b", "c"]}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: the key `group` is written with escapes"):
        JsonlSource(tmp_path / "a.jsonl")[0]


def test_inspection_shows_plain_text_and_every_pair(tmp_path, tokenizer):
    records = [{"text": STORY}, {"messages": turns("a", "b", "a", "c")}, {"group": ["x", "y"]}]
    out = {}
    for layout in ("separate", "shared"):
        jepa = {"jepa": {"num_predictors": 0}}
        data = data_of(tmp_path, tokenizer, records, jepa, layout=layout, pairs="turns")
        out[layout] = io.StringIO()
        show_rows(data, tokenizer, 9, Console(file=out[layout], width=400))
    for layout, stream in out.items():
        lines = stream.getvalue().splitlines()[1:]
        assert sum("plain text" in line for line in lines) == 1 and sum("conversation" in line for line in lines) == 2
        marks = sum(line.count("← pair") for line in lines)
        assert marks == 8, layout
        assert "3 examples in" in lines[-1] and "4 pairs" in lines[-1]
    assert not any("text view" in line for line in out["shared"].getvalue().splitlines()[1:])
