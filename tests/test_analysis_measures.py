# SPDX-License-Identifier: Apache-2.0
"""What is measured of two views, on cases whose answer is known without it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa_jax.analysis.answers import compare_answers, read_answers
from llm_jepa_jax.analysis.geometry import (
    alignment,
    cosines,
    mismatched,
    principal_plane,
    rms_norm,
    singular_values,
    uniformity,
    unit_rows,
)
from llm_jepa_jax.analysis.linear_map import halves, linear_map
from llm_jepa_jax.analysis.measures import Embeddings, Pairs, measure
from llm_jepa_jax.analysis.retrieval import chance, recall
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.objectives.diagnostics import effective_rank


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(seed, size):
    return np.linalg.qr(normal(seed, size, size))[0]


def test_singular_values_are_those_of_the_difference():
    code = normal(0, 50, 8)
    wanted = np.array([9.0, 4.0, 1.0, 0.5])
    basis = np.linalg.qr(normal(1, 50, 4))[0]
    text = code + basis @ np.diag(wanted) @ rotation(2, 8)[:4]
    found = singular_values(text, code)
    np.testing.assert_allclose(found, [*wanted, 0, 0, 0, 0], atol=1e-12)
    assert np.square(found).sum() == pytest.approx(np.square(text - code).sum())


def test_effective_rank_of_equal_directions_is_their_number():
    rows = np.concatenate([np.eye(8)[:5], -np.eye(8)[:5]])
    assert effective_rank(rows) == pytest.approx(5)
    assert effective_rank(np.outer(np.arange(9.0), np.ones(4))) == pytest.approx(1)


def test_alignment_and_uniformity_of_simple_placings():
    rows = normal(0, 12, 6)
    assert alignment(rows, 3 * rows) == pytest.approx(0, abs=1e-12)
    assert alignment(rows, -rows) == pytest.approx(4)
    assert uniformity(np.ones((7, 3))) == pytest.approx(0)
    assert uniformity(np.array([[1.0, 0], [-2, 0]])) == pytest.approx(-8)  # one pair at distance 2: exp(-2 · 4)
    assert uniformity(np.eye(5)) == pytest.approx(-4)  # every pair at squared distance 2
    assert rms_norm(np.array([[3.0, 4], [0, 0]])) == pytest.approx(math.sqrt(12.5))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_measures_do_not_change_under_rotation_and_those_of_the_sphere_not_under_scale(seed, scale):
    text, code, turn = normal(seed, 30, 5), normal(seed + 1, 30, 5), rotation(seed + 2, 5)
    for value in (
        alignment, lambda a, b: uniformity(a), lambda a, b: cosines(a, b, 0).pairs_P.mean(),
        lambda a, b: recall(a, b, range(30), range(30), [3])[3],
    ):  # fmt: skip
        assert value(scale * text @ turn, scale * code @ turn) == pytest.approx(value(text, code), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(singular_values(text @ turn, code @ turn), singular_values(text, code), rtol=1e-9)
    linear = [linear_map(a, b, *np.split(np.arange(30), 2), 0) for a, b in ((text, code), (text @ turn, code @ turn))]
    assert linear[0].pairs == pytest.approx(linear[1].pairs, rel=1e-8)


@settings(max_examples=30, deadline=None)
@given(number=st.integers(2, 60), seed=st.integers(0, 10**6))
def test_nothing_keeps_its_partner(number, seed):
    others = mismatched(number, seed)
    assert sorted(others) == list(range(number)) and (others != np.arange(number)).all()


def test_cosines_and_their_gap():
    rows = rotation(0, 16)
    found = cosines(rows, 2 * rows, 0)
    np.testing.assert_allclose(found.pairs_P, 1)
    np.testing.assert_allclose(found.shuffled_P, 0, atol=1e-12)
    assert math.isnan(found.gap)
    text, code = np.eye(4), np.eye(4) + np.diag([0, 0, 0, -2.0])  # cosines 1, 1, 1, -1, shuffled 0
    assert cosines(text, code, 0).gap == pytest.approx(0.5 / math.sqrt(0.75 / 2))


def test_the_principal_plane_is_that_of_the_greatest_variance():
    rng = np.random.default_rng(0)
    turn = rotation(1, 6)
    flat = np.concatenate([0.02 * rng.normal(size=(40, 2)), np.zeros((40, 3)), np.ones((40, 1))], axis=1) @ turn
    plane = principal_plane(flat[:20], flat[20:])
    assert sum(plane.explained) == pytest.approx(1, abs=1e-3)  # bent a little by the sphere
    both, places = unit_rows(flat), np.concatenate([plane.text_Px2, plane.code_Px2])
    gaps = [np.linalg.norm(rows[:, None] - rows[None], axis=-1) for rows in (both, places)]
    np.testing.assert_allclose(gaps[0], gaps[1], atol=2e-3)
    again = principal_plane(flat[:20], flat[20:])
    np.testing.assert_array_equal(plane.text_Px2, again.text_Px2)


def test_a_linear_map_is_found_exactly_and_nothing_else_is():
    text, weights = normal(0, 400, 12), normal(1, 12, 12)
    train, held_out = np.arange(200), np.arange(200, 400)
    found = linear_map(text, text @ weights + 5.0, train, held_out, 0)
    np.testing.assert_allclose([*found.pairs, *found.rms], 0, atol=1e-12)
    assert found.rank == 12 and not found.too_few
    for chance_level in (found.permuted, found.gaussian):  # 1 − 12/200 and 1 + 12/200 are expected
        assert 0.88 < chance_level.train < 0.98 < 1.0 < chance_level.held_out < 1.2


def test_noise_on_the_codes_is_the_share_that_is_left():
    text, noise = normal(0, 4000, 6), normal(1, 4000, 6)
    train, held_out = np.arange(2000), np.arange(2000, 4000)
    found = linear_map(text, text + 0.5 * noise, train, held_out, 0)
    assert found.pairs.train == pytest.approx(0.2, abs=0.01) and found.pairs.held_out == pytest.approx(0.2, abs=0.01)
    assert found.rms.held_out == pytest.approx(0.5 * math.sqrt(6), rel=0.03)


def test_too_few_pairs_fit_anything_and_are_told():
    text, code = normal(0, 60, 40), normal(1, 60, 40)
    found = linear_map(text, code, np.arange(30), np.arange(30, 60), 0)
    assert found.too_few and found.pairs.train < 1e-12 and found.permuted.train < 1e-12 < 1 < found.pairs.held_out


def test_directions_that_are_rounding_are_cut_off():
    low = (normal(0, 200, 3) @ normal(1, 3, 20) + 100.0).astype(np.float32)  # float32 rounds at 100 · 6e-8
    found = linear_map(low, low @ normal(2, 20, 20), np.arange(100), np.arange(100, 200), 0)
    assert found.rank == 3 and found.pairs.held_out < 1e-8


def test_pairs_that_share_a_record_or_a_text_stay_together():
    records = [f"r{i // 2}" for i in range(40)]
    texts = [f"t{i}" for i in range(40)]
    texts[7] = texts[20] = "the same"
    train, held_out = halves(records, texts)
    assert sorted([*train, *held_out]) == list(range(40)) and 16 <= len(train) <= 24
    for names in (records, texts):
        assert not {names[i] for i in train} & {names[i] for i in held_out}
    assert min(map(len, halves(["one"] * 5))) == 0


def test_recall_counts_the_nearest():
    target = np.eye(6)
    query = target.copy()
    query[0] = [0.5, 0.9, 0.7, 0, 0, 0]  # its own is third
    found = recall(query, target, range(6), range(6), [1, 2, 3])
    assert found == {1: pytest.approx(5 / 6), 2: pytest.approx(5 / 6), 3: 1.0}


def test_recall_of_collapsed_embeddings_is_chance():
    names, point = [str(i) for i in range(40)], np.ones((40, 3))
    found = recall(point, point, names, names, [1, 10, 40])
    assert found == pytest.approx({1: 1 / 40, 10: 10 / 40, 40: 1.0}) == chance(names, names, [1, 10, 40])


def test_equal_contents_are_one_candidate_and_shared_ones_are_right():
    """Three texts of one code, and one of another: whichever way it is asked, a perfect model is perfect."""
    texts, codes = ["a", "b", "c", "d"], ["x", "x", "x", "y"]
    query, target = np.eye(3)[[0, 0, 0, 1]], np.eye(3)[[0, 0, 0, 1]]
    assert recall(query, target, texts, codes, [1])[1] == 1.0 == recall(target, query, codes, texts, [1])[1]
    assert chance(texts, codes, [1])[1] == 0.5
    assert chance(codes, texts, [1])[1] == pytest.approx((3 * 3 / 4 + 1 / 4) / 4)
    assert chance(codes, texts, [2])[2] == pytest.approx((3 * 1.0 + 2 / 4) / 4)


@settings(max_examples=20, deadline=None)
@given(
    contents=st.lists(st.sampled_from("ab"), min_size=5, max_size=5),
    levels=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    k=st.integers(1, 5),
)
def test_ties_are_worth_what_a_random_order_would_be(contents, levels, k):
    """Against all orders; where a content has several targets, any of them is right."""
    angles = 0.4 * np.array(levels)
    candidates = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    queries = np.tile([1.0, 0.0], (5, 1))
    hits = []
    for order in itertools.permutations(range(5)):
        nearest = sorted(range(5), key=lambda i: (levels[i], order[i]))[:k]
        hits += [any(contents[i] == content for i in nearest) for content in contents]
    assert recall(queries, candidates, contents, range(5), [k])[k] == pytest.approx(np.mean(hits))


def test_all_measures_of_one_model_as_json():
    texts = tuple(f"t{i}" for i in range(40))
    pairs = Pairs(tuple(f"f:{i}" for i in range(40)), texts, tuple(f"c{i}" for i in range(40)))
    text = normal(0, 40, 6).astype(np.float32)
    found = measure(Embeddings(text, text * 2), pairs, pairs.halves()).summary()
    assert found["recall"]["text_to_code"] == {"recall@1": 1.0, "recall@10": 1.0}
    assert found["cosine"]["pairs"]["mean"] == pytest.approx(1) and found["alignment"] == pytest.approx(0, abs=1e-9)
    assert found["linear_map"]["pairs"]["held_out"] < 1e-9 < 0.5 < found["linear_map"]["permuted"]["held_out"]
    assert found["length"]["code"] == pytest.approx(2 * found["length"]["text"])
    kept = pairs.only(np.arange(40) % 2 == 0)
    assert len(kept) == 20 and kept.locations[1] == "f:2" and kept.codes[-1] == "c38"


def line(record, verdict, prompt="q", target="t", **more):
    return {
        "record": record,
        "prompt": prompt,
        "target": target,
        "answer": verdict,
        "verdict": verdict,
        "reason": "",
    } | more


def test_fixed_and_broken_are_counted_and_tested():
    first = [line(f"f:{i}", "right" if i < 4 else "wrong") for i in range(20)]
    second = [line(f"f:{i}", "wrong" if i == 0 else ("right" if i < 14 else "unparsed")) for i in range(20)][::-1]
    second += [{"record": "f:99", "verdict": "skipped", "reason": "no"}]
    first += [line("f:99", "right")]
    found = compare_answers("NTP", "JEPA", first, second)
    facts = found.summary()
    assert [facts[k] for k in ("fixed", "broken", "both_right", "both_wrong", "skipped")] == [10, 1, 3, 6, 1]
    assert facts["mcnemar_p"] == pytest.approx(2 * (1 + 11) / 2**11)  # two tails of Binomial(11, 1/2) at 10
    assert (facts["share_right_first"], facts["share_right_second"]) == (0.2, 0.65)
    lines = list(found.lines())
    assert len(lines) == 20 and lines[0]["kind"] == "broken"
    assert lines[4]["answers"] == {"NTP": "wrong", "JEPA": "right"}
    assert compare_answers("a", "b", first, first).p == 1.0


def test_other_records_are_refused():
    ours = [line("f:1", "right"), line("f:2", "right")]
    with pytest.raises(UserError, match="a answered f:2, b did not"):
        compare_answers("a", "b", ours, ours[:1])
    with pytest.raises(UserError, match="f:2: a and b were asked other prompts or targets"):
        compare_answers("a", "b", ours, [ours[0], line("f:2", "right", target="other")])


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "exact_match-4.jsonl"
    path.write_text(
        '{"record": "f:1", "prompt": "q", "target": "t", "answer": "\u2028", "verdict": "right", "reason": ""}\n'
    )
    assert read_answers(path)[0]["answer"] == "\u2028"
    for wrong in ('{"record": "f:1"', '{"record": "f:1", "loss": 2.0, "tokens": 3}', "[]"):
        path.write_text('{"record": "f:0", "verdict": "skipped", "reason": "no"}\n' + wrong + "\n")
        with pytest.raises(UserError, match=r"exact_match-4.jsonl:2: no judged answer"):
            read_answers(path)
