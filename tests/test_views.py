# SPDX-License-Identifier: Apache-2.0
"""Which view predicts, and where its predictor tokens lie, in every layout."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.config import Config, freeze
from llm_jepa_jax.data.packing import Plan
from llm_jepa_jax.data.sources import open_splits
from llm_jepa_jax.data.views import branch_size
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.encode import view_ids
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.text.chat import render_view
from tests.conftest import host_rows, small_config, small_data

DIRECTIONS, PLACEMENTS = ("text_to_code", "code_to_text"), ("append", "prepend")
ALLOWED = [
    (layout, direction, placement)
    for layout in ("separate", "padded", "shared")
    for direction in DIRECTIONS
    for placement in PLACEMENTS
    if (layout, direction, placement) != ("shared", "text_to_code", "prepend")
]


@pytest.mark.parametrize(("layout", "direction", "placement"), [case for case in ALLOWED if case[0] != "shared"])
@pytest.mark.parametrize("predictors", [0, 1, 3])
def test_pairs_lead_from_the_view_that_predicts_to_the_other(
    tmp_path, tokenizer, layout, direction, placement, predictors
):
    """The segment that ends at each pointer, token for token, and what the façade encodes for it."""
    jepa = {"direction": direction, "placement": placement, "num_predictors": predictors, "view_end": "turn"}
    config = small_config(tmp_path, data={"layout": layout}, objective={"jepa": jepa}, train={"num_steps": 8})
    expected = expected_views(config, tokenizer, direction, placement, predictors)
    found = set()
    for row in host_rows(small_data(config, tokenizer)):
        for pair in np.flatnonzero(row["pair_weight"]):
            ends = [int(row[name][pair]) for name in ("predictor_index", "code_index")]
            segments = [np.flatnonzero(row["segments"] == row["segments"][end]) for end in ends]
            assert [int(segment[-1]) for segment in segments] == ends
            found.add(tuple(tuple(row["tokens"][segment].tolist()) for segment in segments))
    assert found and found <= expected
    assert len(found) == len(expected)


def expected_views(config, tokenizer, direction, placement, predictors):
    """(tokens of the view that predicts, tokens of the other) of every record, spelt out by hand."""
    source, ids = open_splits(config.data, config.seed).train, list(tokenizer.predictor_ids[:predictors])
    expected = set()
    for record in (source[i] for i in range(len(source))):
        (pair,) = record.pairs("last")
        text = render_view(tokenizer, "user", pair.text).tokens
        code = render_view(tokenizer, "assistant", pair.code).tokens
        first, second = (text, code) if direction == "text_to_code" else (code, text)
        first = [*first[:2], *ids, *first[2:]] if placement == "prepend" else [*first, *ids]
        first, second = ([*view, tokenizer.end_of_turn_id] for view in (first, second))
        expected.add((tuple(first), tuple(second)))
        names = ("text", "code") if direction == "text_to_code" else ("code", "text")
        for name, content, tokens in zip(names, sorted_by(names, pair), (first, second), strict=True):
            (shown,) = view_ids(tokenizer, config.objective.jepa, name, [content])
            assert shown.tolist() == tokens and shown.dtype == np.int32
    return expected


def sorted_by(names, pair):
    return [getattr(pair, name) for name in names]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("view_end", ["content", "turn"])
def test_code_to_text_reads_its_target_inside_the_conversation(tmp_path, tokenizer, placement, view_end):
    """Shared layout, after a system turn and an earlier exchange too: no branch, and no text view."""
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c d"), ("assistant", "e f")]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    jepa = {"direction": "code_to_text", "placement": placement, "num_predictors": 2, "view_end": view_end}
    files = {"train": str(path), "eval": str(path), "layout": "shared"}
    data = small_data(small_config(tmp_path, data=files, objective={"jepa": jepa}), tokenizer)
    row = host_rows(data)[0]
    assert data.kinds[0].row.branch == 0 and len(row["tokens"]) == len(row["segments"]) and row["segments"].max() == 2
    end = [tokenizer.end_of_turn_id] if view_end == "turn" else []
    place = int(row["code_index"][0])
    seen = [tokenizer.role_ids["user"], *tokenizer.encode("c d"), *end]
    assert row["tokens"][place + 1 - len(seen) : place + 1].tolist() == seen and row["segments"][place] == 1
    ids, code = list(tokenizer.predictor_ids[:2]), tokenizer.encode("e f")
    header = [tokenizer.bos_id, tokenizer.role_ids["assistant"]]
    view = header + (code + ids if placement == "append" else ids + code) + end
    segment = np.flatnonzero(row["segments"] == 2)
    assert row["tokens"][segment].tolist() == view and row["predictor_index"][0] == segment[-1]


CONTENT = st.text("ab 1", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(ALLOWED),
    predictors=st.integers(0, 10),
    targets=st.sampled_from(["all", "assistant"]),
    view_end=st.sampled_from(["content", "turn"]),
    turns=st.lists(st.lists(CONTENT, min_size=2, max_size=4), min_size=1, max_size=4),
)
def test_costs_are_the_tokens_laid(tmp_path, tokenizer, case, predictors, targets, view_end, turns):
    """Tokens, targets and the longest segment of each example, with and without its pair."""
    layout, direction, placement = case
    path = tmp_path / "a.jsonl"
    roles = ["user", "assistant"] * 2
    records = [[{"role": r, "content": c} for r, c in zip(roles, t[: len(t) // 2 * 2], strict=False)] for t in turns]
    path.write_text("".join(json.dumps({"messages": record}) + "\n" for record in records))
    jepa = {"direction": direction, "placement": placement, "num_predictors": predictors, "view_end": view_end}
    config = small_config(
        tmp_path,
        data={"layout": layout, "train": str(path), "eval": str(path)},
        objective={"ntp": {"targets": targets}, "jepa": jepa},
    )
    data = small_data(config, tokenizer)
    costs, branch = data.epochs.costs, branch_size(config)
    shape = RowShape(256, 256, 1, branch=branch)
    for example in range(len(records)):
        for pair in (False, True):
            plan = Plan(np.array([example]), np.array([pair]), np.zeros((1, 0, 2), np.int32), np.array([0, 1]))
            row = {name: array[0] for name, array in data.builder(plan, 1, shape).items()}
            lengths = np.bincount(row["segments"])[1:]
            assert lengths.sum() == costs.tokens(np.full(len(records), pair))[example]
            assert lengths.max() <= costs.longest_N[example] and (not pair or lengths.max() == costs.longest_N[example])
            assert row["target_weight"].sum() == costs.targets_N[example]
            assert np.count_nonzero(row["tokens"][256:]) == branch * pair
            assert data.epochs.tokens(plan) == lengths.sum() + branch * pair


def test_prepending_to_a_text_that_is_already_read_is_refused():
    objective = {"jepa": {"placement": "prepend"}}
    shared = freeze({"data": {"layout": "shared"}, "objective": objective})
    with pytest.raises(UserError, match=r"`objective.jepa.placement`=prepend .*; use data.layout=separate$"):
        resolve(shared, {})
    for changes in ({"direction": "code_to_text"}, {"weight": 0.0}):
        jepa = {"jepa": objective["jepa"] | changes}
        assert isinstance(resolve(freeze({"data": {"layout": "shared"}, "objective": jepa}), {}), Config)
