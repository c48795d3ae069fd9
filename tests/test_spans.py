# SPDX-License-Identifier: Apache-2.0
"""Spans of semantic tube prediction: how they are drawn, and what the rows of a run point to."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa_jax.batch import CODE_BEFORE, CODE_END, SPAN_BEFORE, SPAN_END, USER_BEFORE, USER_END
from llm_jepa_jax.data.sources import open_splits
from llm_jepa_jax.data.spans import content_points, draw_spans, span_points, span_weights, text_lengths
from llm_jepa_jax.objective_config import StpConfig
from llm_jepa_jax.text.chat import render
from tests.conftest import host_rows, small_config, small_data

DRAWS = ("start_then_end", "both", "uniform")
CONFIGS = st.builds(
    StpConfig,
    mode=st.sampled_from(["random_span", "mask", "mask_recover"]),
    draw=st.sampled_from(DRAWS),
    draws=st.integers(1, 3),
    from_start=st.booleans(),
    max_length=st.sampled_from([0, 1, 2, 7, 50]),
)
TEXTS = st.lists(st.tuples(*[st.integers(0, 30)] * 4), min_size=1, max_size=8)


def points_of(texts):
    """[N, 4] from (before the user's content, its length, gap, length of the assistant's)."""
    return np.cumsum(np.array(texts, np.int64).reshape(-1, 4), axis=1)


def fixed_length(length, count):
    """Texts of one length."""
    return points_of([(1, length // 2, 3, length - length // 2)] * count)


@settings(max_examples=100, deadline=None)
@given(stp=CONFIGS, texts=TEXTS, seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_spans_are_allowed_and_depend_on_their_own_example_only(stp, texts, seed, epoch):
    points = points_of(texts)
    lengths = text_lengths(points)
    spans = draw_spans(stp, seed, epoch, points, np.arange(len(points)))
    assert spans.shape == (len(texts), stp.draws, 2) and spans.dtype == np.int32
    start, end = spans[..., 0], spans[..., 1]
    long = lengths >= 2
    assert not spans[~long].any()
    assert (start >= 0).all() and (start < end)[long].all() and (end <= lengths[:, None]).all()
    assert (end - start < lengths[:, None])[long].all()
    assert not stp.max_length or (end - start <= stp.max_length).all()
    assert not (stp.from_start and start.any())
    one = len(texts) // 2
    others = np.concatenate([points + [0, 5, 5, 9], points])
    others[one] = points[one]
    alone = np.array([one])
    np.testing.assert_array_equal(draw_spans(stp, seed, epoch, others[alone], alone)[0], spans[one])


@pytest.mark.parametrize("draw", DRAWS)
def test_spans_change_with_epoch_seed_example_and_draw(draw):
    stp, points = StpConfig(draw=draw, draws=2), fixed_length(10**6, 50)
    sets = [draw_spans(stp, seed, epoch, points, np.arange(50)) for seed, epoch in itertools.product((0, 1), (0, 1))]
    found = {tuple(span) for spans in sets for span in spans.reshape(-1, 2).tolist()}
    assert len(found) == 4 * 50 * 2


def probabilities(stp, length):
    """{span: probability} by going through everything that can be drawn."""

    def allowed(start, end):
        return start < end and end - start < length and not (stp.max_length and end - start > stp.max_length)

    starts = [0] if stp.from_start else range(length)
    found = collections.Counter()
    if stp.draw == "uniform":
        found.update((s, e) for s in starts for e in range(length + 1) if allowed(s, e))
    elif stp.draw == "both":
        for one, other in itertools.product(range(length), range(1, length + 1)):
            start, end = (0 if stp.from_start else min(one, other)), max(one, other)
            end = min(end, start + stp.max_length) if stp.max_length else end
            found[start, end] += int(allowed(start, end))
    else:
        for start in starts:
            ends = [end for end in range(length + 1) if allowed(start, end)]
            found.update({(start, end): 1 / len(ends) for end in ends})
    return {span: weight / found.total() for span, weight in found.items() if weight}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(
    ("length", "max_length", "from_start"),
    [(4, 0, False), (2, 0, False), (7, 3, False), (7, 0, True), (6, 2, True), (5, 9, False)],
)
def test_each_rule_has_its_exact_distribution(draw, length, max_length, from_start):
    """χ² of a fixed seed within five of its standard deviations."""
    stp = StpConfig(draw=draw, draws=2, max_length=max_length, from_start=from_start)
    expected, count = probabilities(stp, length), 20000
    spans = draw_spans(stp, 3, 1, fixed_length(length, count // 2), np.arange(count // 2)).reshape(-1, 2)
    found = collections.Counter(map(tuple, spans.tolist()))
    assert found.keys() == expected.keys()
    squares = sum((found[span] - count * p) ** 2 / (count * p) for span, p in expected.items())
    freedom = len(expected) - 1
    assert squares <= freedom + 5 * np.sqrt(2 * freedom)


def test_the_rules_are_the_published_ones():
    """Of 4 tokens the default draws the last one in 1 of 4 and the first in 1 of 12; `both` draws inner spans twice as
    often as others; `uniform` draws 9 spans alike.
    """
    default, both, uniform = (probabilities(StpConfig(draw=draw), 4) for draw in DRAWS)
    assert default[3, 4] == pytest.approx(1 / 4) and default[0, 1] == pytest.approx(1 / 12)
    assert both[1, 3] == pytest.approx(2 * both[0, 1]) and both[0, 1] == pytest.approx(both[2, 4])
    assert set(uniform.values()) == {1 / 9} and len(uniform) == 9


def test_modes_without_draws():
    points = points_of([(1, 4, 2, 3), (1, 0, 2, 1)])
    for mode in ("mean", "curvature"):
        spans = draw_spans(StpConfig(mode=mode), 0, 0, points, np.arange(len(points)))
        assert not spans.any() and span_weights(StpConfig(mode=mode), spans[0], np.array([0, 4, 5, 8])).tolist() == [
            1.0
        ]
    spans = draw_spans(StpConfig(mode="e2e"), 0, 0, points, np.arange(len(points)))
    assert spans.tolist() == [[[4, 7]], [[0, 1]]]


@pytest.mark.parametrize(
    ("weighting", "expected"), [("none", [1, 1, 0]), ("cosine", [2 * 3 * 7 / 58, 1, 0]), ("jaccard", [0.6, 1, 0])]
)
def test_length_weights(weighting, expected):
    spans = np.array([[2, 5], [0, 5], [0, 0]])
    weights = span_weights(StpConfig(length_weighting=weighting), spans, np.array([0, 6, 8, 12]))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def contents_of(points):
    """Places of the content tokens between the points of one text."""
    user = range(points[USER_BEFORE] + 1, points[USER_END] + 1)
    return [*user, *range(points[CODE_BEFORE] + 1, points[CODE_END] + 1)]


@settings(max_examples=50, deadline=None)
@given(stp=CONFIGS, text=st.tuples(*[st.integers(0, 30)] * 4))
def test_points_enclose_exactly_the_drawn_tokens(stp, text):
    points = points_of(text)
    (spans,) = draw_spans(stp, 0, 0, points, np.arange(1))
    places = contents_of(points[0])
    for (start, end), six in zip(spans, span_points(points[0], spans), strict=True):
        assert six[:4].tolist() == points[0].tolist()
        assert [p for p in places if six[SPAN_BEFORE] < p <= six[SPAN_END]] == places[start:end]


def records_of(config):
    source = open_splits(config.data, config.seed).train
    return [source[i] for i in range(len(source))]


def expected_texts(config, tokenizer, draw):
    """{tokens of the text: (conversation, place of each of them, its spans)} of every record in the first epoch."""
    stp = config.objective.stp
    rendered = [render(tokenizer, record.messages) for record in records_of(config)]
    points = content_points(np.stack([r.contents[-2:].reshape(-1) for r in rendered]), stp)
    spans = draw(stp, config.seed, 0, points, np.arange(len(points)))
    found = {}
    for conversation, own in zip(rendered, spans, strict=True):
        tokens, (user, assistant) = conversation.tokens.tolist(), conversation.contents[-2:].tolist()
        first = (0 if stp.adds_segments else 1) if stp.whole_conversation else user[0] + 1
        between = range(user[1] + 1, assistant[0] + 1) if stp.across_turns else ()
        places = [*range(first, user[1] + 1), *between, *range(assistant[0] + 1, assistant[1] + 1)]
        found[tuple(tokens[p] for p in places)] = (tokens, places, [tuple(s) for s in own.tolist()])
    assert len(found) == len(rendered)
    return found


STRETCHES = [{}, {"across_turns": True}, {"whole_conversation": True}]


@pytest.mark.parametrize("layout", ["separate", "shared", "padded"])
@pytest.mark.parametrize("stretch", STRETCHES)
def test_rows_point_at_the_drawn_tokens(tmp_path, tokenizer, layout, stretch):
    stp = {"weight": 1.0, "draws": 2, **stretch}
    config = small_config(
        tmp_path, data={"layout": layout}, objective={"stp": stp}, train={"num_steps": 0, "num_epochs": 1}
    )
    expected, seen = expected_texts(config, tokenizer, draw_spans), collections.Counter()
    for row in host_rows(small_data(config, tokenizer)):
        used = np.flatnonzero(row["span_weight"])
        assert len(used) == 2 * row["num_examples"]
        for slot in used:
            six = row["span_points"][slot]
            assert len(set(row["segments"][six])) == 1
            places = contents_of(six)
            text = tuple(row["tokens"][places].tolist())
            span = [number for number, place in enumerate(places) if six[SPAN_BEFORE] < place <= six[SPAN_END]]
            assert (span[0], span[-1] + 1) in expected[text][2]
            seen[text, span[0], span[-1] + 1] += 1
    assert seen == collections.Counter((text, *span) for text, (*_, spans) in expected.items() for span in spans)


@pytest.mark.parametrize("layout", ["separate", "shared", "padded"])
@pytest.mark.parametrize("mode", ["mask", "mask_recover"])
@pytest.mark.parametrize("stretch", STRETCHES)
def test_masked_rows_hold_the_text_without_the_span(tmp_path, tokenizer, layout, mode, stretch):
    config = small_config(
        tmp_path,
        data={"layout": layout, "row_length": 512},
        objective={"stp": {"weight": 1.0, "mode": mode, **stretch}},
        train={"num_steps": 0, "num_epochs": 1},
    )
    expected = collections.Counter()
    for tokens, places, ((start, end),) in expected_texts(config, tokenizer, draw_spans).values():
        masked = [tokenizer.mask_id if p in places[start:end] else tokens[p] for p in range(places[0], places[-1] + 1)]
        other = tokens[places[0] : places[-1] + 1] if mode == "mask_recover" else [tokens[p] for p in places[start:end]]
        expected[tuple(masked), tuple(other)] += 1
    found, assistants = collections.Counter(), 0
    for row in host_rows(small_data(config, tokenizer)):
        for slot in np.flatnonzero(row["span_weight"]):
            ends = row["span_points"][slot, [SPAN_BEFORE, SPAN_END]]
            segments = [np.flatnonzero(row["segments"] == row["segments"][end]) for end in ends]
            assert [segment[-1] for segment in segments] == ends.tolist()
            for segment in segments:
                assert row["positions"][segment].tolist() == list(range(len(segment)))
            found[tuple(tuple(row["tokens"][segment].tolist()) for segment in segments)] += 1
        assistants += row["num_examples"]
    assert found == expected and assistants == expected.total()
