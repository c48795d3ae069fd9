# SPDX-License-Identifier: Apache-2.0
"""Terms of the total in training: devices, micro-batches and layouts change none, and each reaches the trunk."""

import chex
import jax
import numpy as np
import pytest

from llm_jepa_jax.objectives.jepa import pair_embeddings
from llm_jepa_jax.objectives.parameters import init_parameters
from llm_jepa_jax.train.step import gradients
from tests.conftest import host_batch, small_config, small_data
from tests.test_step import assert_same_training

INNER = {"linear_predictor": True, "layer": 1, "final_norm": False}
ADDED = {
    "spans": {
        "jepa": {"pooling": "mean", "dropout": 0.3, **INNER},
        "stp": {"weight": 0.5, "draws": 2, "linear_predictor": True, "length_weighting": "cosine"},
    },
    "e2e": {"jepa": {"weight": 0.0}, "stp": {"weight": 1.0, "mode": "e2e"}},
    "mean": {"jepa": {"weight": 0.0}, "stp": {"weight": 1.0, "mode": "mean", "distance": "mse"}},
    "mask": {"jepa": {"distance": "mse", "schedule": "linear"}, "stp": {"weight": 1.0, "mode": "mask", **INNER}},
    "mask_recover": {"jepa": {"weight": 0.0}, "stp": {"weight": 1.0, "mode": "mask_recover"}},
    "curvature": {"jepa": {"distance": "l2", "pooling": "mean"}, "stp": {"weight": 1.0, "mode": "curvature"}},
}
"""Objectives whose terms are sums over pairs and spans."""
WHOLE = {
    "infonce": {"jepa": {"distance": "infonce"}, "stp": {"weight": 1.0, "distance": "infonce"}},
    "spread": {"sigreg": {"weight": 0.1, "directions": 16}, "vicreg": {"weight": 1.0}, "jepa": {"dropout": 0.3}},
}
"""Objectives that relate the pairs of a step to each other."""
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
DATA = {"row_length": 384}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("spans", MESH), ("e2e", {"data": 8}), ("mean", MESH), ("mask_recover", {"data": 8}), ("infonce", MESH),
     ("spread", {"data": 8}), pytest.param("mask", MESH, marks=pytest.mark.slow)],
)  # fmt: skip
def test_devices_change_nothing(cache_dir, tokenizer, name, mesh):
    assert_same_training(cache_dir, tokenizer, mesh, 8, {}, objective=(ADDED | WHOLE)[name], data=DATA)


ALSO_CUT = ("e2e", "mean", "mask_recover")
"""Sums over spans like the others', whose batches are cut by devices above."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALSO_CUT)) for name in ADDED])
def test_micro_batches_change_nothing(cache_dir, tokenizer, name):
    train = {"micro_batches": 4, "remat": "full" if name == "spans" else "none"}
    assert_same_training(cache_dir, tokenizer, {"fsdp": 2, "data": 1}, 2, train, objective=ADDED[name], data=DATA)


LAYOUTS = [
    pytest.param(name, layout, marks=[] if number % 2 == column else pytest.mark.slow)
    for number, name in enumerate([*ADDED, *WHOLE])
    for column, layout in enumerate(("shared", "padded"))
]
"""Each objective in one other layout; in both is slow."""


@pytest.mark.parametrize(("name", "other_layout"), LAYOUTS)
def test_layouts_change_nothing(cache_dir, tokenizer, name, other_layout):
    """Loss and gradient over the same examples, packed with others, read inside the conversation, or alone in a row."""
    results = []
    for layout in ("separate", other_layout):
        config = small_config(
            cache_dir,
            data={**DATA, "layout": layout, "rows_per_step": 24, "synthetic_train": 24},
            objective=(ADDED | WHOLE)[name],
            train={"num_steps": 0, "num_epochs": 1},
        )
        data = small_data(config, tokenizer)
        assert data.num_steps == 1  # all examples in one step, whatever their rows
        params = init_parameters(jax.random.key(0), config)
        batch = host_batch(data)
        run = jax.jit(lambda p, b, c=config, s=data.kinds[0].row.longest_segment: gradients(p, b, c, s))
        results.append(run(params, batch))
    (total, grads, aux, weights), (other, other_grads, other_aux, other_weights) = results
    chex.assert_trees_all_close(other_weights, weights, rtol=1e-6)
    chex.assert_trees_all_close((other, other_aux["sums"]), (total, aux["sums"]), rtol=1e-5)
    chex.assert_trees_all_close(other_grads, grads, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("view_end", ["content", "turn"])
def test_mean_pooling_takes_the_whole_view_up_to_where_it_is_read(cache_dir, tokenizer, view_end):
    """Its first token included; the one behind that place not."""
    offset = 1 if view_end == "turn" else 0
    jepa = {"pooling": "mean", "view_end": view_end, "view_end_offset": offset}
    config = small_config(cache_dir, objective={"jepa": jepa})
    batch = host_batch(small_data(config, tokenizer))
    hidden = np.random.default_rng(0).normal(size=(*batch.tokens.shape, 3)).astype(np.float32)
    views = [np.asarray(view) for view in pair_embeddings(hidden, batch, config.objective.jepa)]
    rows, slots = np.nonzero(batch.pair_weight)
    assert len(rows) > 8
    for row, slot in zip(rows, slots, strict=True):
        for view, end in zip(views, (batch.predictor_index, batch.code_index), strict=True):
            segment = np.flatnonzero(batch.segments[row] == batch.segments[row, end[row, slot]])
            assert segment[-1] == end[row, slot] + offset
            expected = hidden[row, segment[: len(segment) - offset]].mean(0)
            np.testing.assert_allclose(view[row, slot], expected, atol=1e-6)


ALONE = {
    **{f"jepa_{distance}": {"jepa": {"distance": distance}} for distance in ("cosine", "l2", "mse", "infonce")},
    "jepa_mean": {"jepa": {"pooling": "mean", "linear_predictor": True}},
    **{
        f"stp_{mode}": {"stp": {"weight": 1.0, "mode": mode, "linear_predictor": mode != "curvature"}}
        for mode in ("random_span", "e2e", "mean", "curvature", "mask", "mask_recover")
    },
    "sigreg": {"sigreg": {"weight": 1.0, "directions": 16}},
    "vicreg": {"vicreg": {"weight": 1.0, "target_std": 1.0}},
}


LIKE_ANOTHER = ("jepa_l2", "jepa_mse", "stp_e2e", "stp_mask_recover")
"""Their formulas' gradients are tested in test_distance.py, and the way to the trunk is another's."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_ANOTHER)) for name in ALONE]
)
def test_each_term_alone_moves_every_parameter(cache_dir, tokenizer, name):
    """The embedding, every layer, the final norm and the term's own matrix."""
    section = name.split("_", 1)[0]
    # The regularisers need the views in the rows.
    off = {} if section == "jepa" else {"jepa": {"weight": 1e-20 if section != "stp" else 0.0}}
    objective = {"ntp": {"weight": 0.0}, **off, **ALONE[name]}
    config = small_config(cache_dir, data=DATA, objective=objective)
    params = init_parameters(jax.random.key(0), config)
    batch = host_batch(small_data(config, tokenizer))
    grads = jax.jit(lambda p, b: gradients(p, b, config)[1])(params, batch)
    assert ("predictors" in grads) == ALONE[name][section].get("linear_predictor", False)
    for path, leaf in jax.tree.leaves_with_path(grads):
        where = jax.tree_util.keystr(path)
        for part in leaf if "layers" in where else [leaf]:
            assert np.abs(part).max() > 1e-9, where
