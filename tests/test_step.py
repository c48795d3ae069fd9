# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import importlib.util
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.batch import FIELDS, RowShape, abstract_batch
from llm_jepa_jax.config import MeshConfig, freeze
from llm_jepa_jax.models.transformer import abstract_params, init_params
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import global_batch, parameter_spec, rows_sharding
from llm_jepa_jax.train.optimizer import learning_rate
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import gradients, make_train_step
from tests.conftest import host_batch, host_rows, replace_rows, small_config, small_data

STEPS = 4


@functools.cache
def losses_of(config, tokenizer, devices):
    """Total loss of each of a few steps, and the last parameters."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    data = small_data(config, tokenizer)
    factory = state_factory(config, mesh, STEPS)
    state, losses = factory.create(), []
    steps = [make_train_step(factory, STEPS, kind.row.longest_segment) for kind in data.kinds]
    with jax.set_mesh(mesh):
        for number in range(STEPS):
            values = data.steps()[number]
            state, metrics = steps[int(values["kind"])](state, global_batch(mesh, values))
            losses.append(float(metrics["last"]["total_loss"]))
    return losses, jax.tree.map(np.asarray, state.params)


def assert_same_training(cache_dir, tokenizer, mesh, devices, train, **same):
    """Losses of a few steps, and the parameters then, against one device and whole steps."""
    plain, params = losses_of(small_config(cache_dir, **same), tokenizer, 1)
    other, other_params = losses_of(small_config(cache_dir, **same, mesh=mesh, train=train), tokenizer, devices)
    np.testing.assert_allclose(other, plain, rtol=1e-5)
    assert jax.tree.structure(params) == jax.tree.structure(other_params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, other_params)
    assert max(jax.tree.leaves(moved)) < 2e-4  # Adam divides tiny gradients by themselves


MECHANICS = (
    ({"data": 8}, 8, 1),
    ({"fsdp": 8, "data": 1}, 8, 1),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 8, 1),
    ({"data": 1}, 1, 4),
    ({"fsdp": 2, "data": 1}, 2, 4),
    ({"fsdp": 2, "tensor": 2, "data": 1}, 4, -4),
    ({"slices": 2, "data": 2, "fsdp": 2}, 8, 1),
    ({"slices": 2, "data": 1, "fsdp": 2}, 4, -2),
)
"""Mesh, devices, micro-batches (negative: with recomputation)."""
PAIRS = (("shared", "example"), ("separate", "example"), ("shared", "step"))
CROSSED = [
    pytest.param(*mechanics, *pairs, marks=[] if number % len(PAIRS) == PAIRS.index(pairs) else pytest.mark.slow)
    for number, mechanics in enumerate(MECHANICS)
    for pairs in PAIRS
]
"""Each of the mechanics once, each way of pairs with several of them; all with all are slow."""


@pytest.mark.parametrize(("mesh", "devices", "micro_batches", "layout", "by"), CROSSED)
def test_devices_and_micro_batches_change_nothing(cache_dir, tokenizer, mesh, devices, micro_batches, layout, by):
    train = {"micro_batches": abs(micro_batches), "remat": "full" if micro_batches < 0 else "none"}
    objective = {"jepa": {"dropout": 0.4, "dropout_by": by}}
    assert_same_training(cache_dir, tokenizer, mesh, devices, train, objective=objective, data={"layout": layout})


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_micro_batches_add_gradients_by_weight(tmp_path, tokenizer, remat):
    """Even when all targets and pairs lie in one micro-batch."""
    config = small_config(tmp_path, train={"remat": remat})
    batch = host_batch(small_data(config, tokenizer))
    lonely = np.array([1, 0, 0, 0, 1, 0, 0, 0], np.float32)[:, None]
    batch = replace_rows(batch, target_weight=batch.target_weight * lonely, pair_weight=batch.pair_weight * lonely)
    params = init_params(jax.random.key(0), config.model, jnp.float32)
    cut = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batches=4))
    whole, parts = (jax.jit(gradients, static_argnums=2)(params, batch, c) for c in (config, cut))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    chex.assert_trees_all_close(parts[1], whole[1], rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(parts[2]["sums"], whole[2]["sums"], rtol=1e-6)


def test_each_remat_policy_keeps_less_than_the_one_before():
    """Temporary memory of the compiled gradients."""
    kept = []
    for remat in ("none", "dots", "hidden", "full"):
        model = {"vocab_size": 32, "embed_dim": 32, "num_layers": 9, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 64}
        config = freeze({"model": model, "data": {"row_length": 256, "rows_per_step": 8}, "train": {"remat": remat}})
        params, _ = abstract_params(config.model, jnp.float32)
        compiled = jax.jit(lambda p, b, c=config: gradients(p, b, c)[1]).lower(
            params, abstract_batch(8, RowShape(256, 256, 2))
        )
        kept.append(compiled.compile().memory_analysis().temp_size_in_bytes)
    assert kept[0] > 1.2 * kept[1] and kept[1] > 1.1 * kept[2] > 1.1 * 1.1 * kept[3], kept


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_micro_batches_keep_gradients_once(remat):
    """Beyond the gradients themselves, the backward pass holds those of about one layer of 16, and activations."""
    model = {
        "vocab_size": 32, "embed_dim": 128, "num_layers": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        "mlp_dim": 1024,
    }  # fmt: skip
    data = {"row_length": 8, "rows_per_step": 4}
    config = freeze({"model": model, "data": data, "train": {"micro_batches": 4, "remat": remat}})
    params, _ = abstract_params(config.model, jnp.float32)
    batch = abstract_batch(4, RowShape(8, 8, 2))
    memory = jax.jit(lambda p, b: gradients(p, b, config)[1]).lower(params, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.4 * memory.output_size_in_bytes


@pytest.mark.parametrize(
    ("predictors", "view_end", "direction", "placement"),
    [
        (1, "content", "text_to_code", "append"),
        (0, "turn", "text_to_code", "append"),
        (3, "turn", "text_to_code", "append"),
        (0, "content", "code_to_text", "append"),
        (2, "content", "code_to_text", "prepend"),
        pytest.param(0, "content", "text_to_code", "append", marks=pytest.mark.slow),
        pytest.param(1, "turn", "text_to_code", "append", marks=pytest.mark.slow),
        pytest.param(3, "content", "text_to_code", "append", marks=pytest.mark.slow),
        pytest.param(0, "content", "code_to_text", "prepend", marks=pytest.mark.slow),
        pytest.param(2, "content", "code_to_text", "append", marks=pytest.mark.slow),
    ],
)
def test_shared_equals_separate_where_the_text_begins_the_conversation(
    tmp_path, tokenizer, predictors, view_end, direction, placement
):
    """Loss and gradient over the same examples, 1e-5."""
    jepa = {"num_predictors": predictors, "view_end": view_end, "direction": direction, "placement": placement}
    assert_shared_equals_separate(tmp_path, tokenizer, jepa, {})


@pytest.mark.parametrize("jepa", [{"num_predictors": 2}, {"direction": "code_to_text"}], ids=["branches", "no branch"])
def test_shared_equals_separate_for_plain_text_and_several_pairs(tmp_path, tokenizer, jepa):
    """Where the text view is what a document begins with, or the first turn of a conversation."""
    lines = []
    for i in range(20):
        user, code = f"lines that have {i} digits", f"[0-9]{{{i}}}"
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": code}] * 2
        messages[2] = {"role": "user", "content": f"again {i}"}
        pairs = [{"text": user, "code": other} for other in (code, f"<{i}>", "a.b")]
        lines += [{"messages": messages, "pairs": pairs}, {"text": f"lines that start with {i}, or have {user}"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_shared_equals_separate(tmp_path, tokenizer, jepa, {"train": str(path), "eval": str(path)})


def assert_shared_equals_separate(tmp_path, tokenizer, jepa, files):
    results = {}
    for layout in ("separate", "shared"):
        config = small_config(
            tmp_path,
            data={"layout": layout, "rows_per_step": 40} | files,
            objective={"jepa": {"dropout": 0.3} | jepa},
            train={"num_steps": 0, "num_epochs": 1},
        )
        data = small_data(config, tokenizer)
        assert data.num_steps == 1  # all examples in one step, whatever their rows
        params = init_params(jax.random.key(0), config.model, jnp.float32)
        run = jax.jit(lambda p, b, c=config, s=data.kinds[0].row.longest_segment: gradients(p, b, c, s))
        results[layout] = run(params, host_batch(data))
    (total, grads, aux, weights), (other, other_grads, other_aux, other_weights) = results.values()
    assert weights == other_weights and weights["jepa"] > 20
    np.testing.assert_allclose(other, total, rtol=1e-5)
    np.testing.assert_allclose(other_aux["sums"]["jepa"], aux["sums"]["jepa"], rtol=1e-5)
    chex.assert_trees_all_close(other_grads, grads, rtol=1e-5, atol=1e-6)


def test_packed_and_padded_rows_give_each_example_the_same_loss_and_gradient(tmp_path, tokenizer):
    sections = {"objective": {"jepa": {"dropout": 0.5}}, "train": {"num_steps": 0, "num_epochs": 1}}
    params = None
    results = {}
    for layout in ("separate", "padded"):
        config = small_config(tmp_path, data={"layout": layout, "shuffle": False, "synthetic_train": 24}, **sections)
        data = small_data(config, tokenizer)
        params = init_params(jax.random.key(0), config.model, jnp.float32) if params is None else params
        results[layout] = [example_terms(row, params, config) for row in host_rows(data) if row["num_examples"]]
    packed = {key: value for row in results["separate"] for key, value in row.items()}
    padded = {key: value for row in results["padded"] for key, value in row.items()}
    assert packed.keys() == padded.keys() and len(packed) == 24
    for key, (loss, grads) in packed.items():
        np.testing.assert_allclose(loss, padded[key][0], rtol=1e-6)
        chex.assert_trees_all_close(grads, padded[key][1], rtol=1e-4, atol=1e-6)


def example_terms(row, params, config):
    """{conversation: (its loss, its gradient)} of each example of a row, by leaving only its slots in."""
    from llm_jepa_jax.batch import Batch

    compiled = jax.jit(gradients, static_argnums=2)
    segments = row["segments"]
    owner = {}  # segment to conversation: views follow theirs
    current = None
    ends = set(row["predictor_index"][row["pair_weight"] > 0]) | set(row["code_index"][row["pair_weight"] > 0])
    for number in range(1, segments.max() + 1):
        place = np.flatnonzero(segments == number)
        if place[-1] not in ends:
            current = tuple(row["tokens"][place].tolist())
        owner[number] = current
    out = {}
    for conversation in set(owner.values()):
        mine = np.array([owner.get(int(s)) == conversation for s in segments])
        kept = dict(row)
        kept["target_weight"] = row["target_weight"] * mine[row["target_index"]]
        kept["pair_weight"] = row["pair_weight"] * mine[row["predictor_index"]]
        batch = Batch(**{name: kept[name][None] for name in FIELDS})
        total, grads, _, _ = compiled(params, batch, config)
        out[conversation] = (total, grads)
    return out


def test_a_non_finite_step_is_skipped_and_counted(tmp_path, tokenizer):
    config = small_config(tmp_path)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    data = small_data(config, tokenizer)
    factory = state_factory(config, mesh, STEPS)
    step = make_train_step(factory, STEPS)
    good = host_batch(data)
    bad = replace_rows(good, target_weight=np.full_like(good.target_weight, np.inf))
    state = factory.create()
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    skipped = []
    with jax.set_mesh(mesh):
        for batch in (bad, bad, good):
            batch = global_batch(mesh, {name: getattr(batch, name) for name in FIELDS})
            state, metrics = step(state, batch)
            skipped.append((int(metrics["last"]["skipped_steps"]), int(metrics["last"]["skipped_in_row"])))
            if len(skipped) == 2:
                chex.assert_trees_all_equal(jax.tree.map(np.array, (state.params, state.opt_state)), before)
    assert skipped == [(1, 1), (2, 2), (2, 0)] and int(state.step) == 3
    assert not np.array_equal(np.array(state.params["embedding"]), before[0]["embedding"])


def test_norms_are_not_decayed(tmp_path):
    opt = {"learning_rate": 0.5, "weight_decay": 1.0, "schedule": "constant", "warmup_steps": 0}
    factory = state_factory(small_config(tmp_path, opt=opt), make_mesh(MeshConfig(), jax.devices()[:1]), 10)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), factory.abstract.params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = factory.optimizer.update(zeros, factory.optimizer.init(params), params)
    decayed = {jax.tree_util.keystr(path): float(leaf.ravel()[0]) for path, leaf in jax.tree.leaves_with_path(updates)}
    for name, update in decayed.items():
        assert update == (0.0 if "norm" in name else pytest.approx(-0.5)), name


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_schedules(tmp_path, schedule, middle, last):
    opt = {"learning_rate": 1.0, "schedule": schedule, "warmup_steps": 10, "final_scale": 0.1}
    rate = learning_rate(small_config(tmp_path, opt=opt).opt, 110)
    assert 0 < rate(0) < rate(5) < rate(10) == 1.0
    assert rate(60) == pytest.approx(middle, abs=1e-5) and rate(110) == pytest.approx(last, abs=1e-5)


def preset(repository, name):
    spec = importlib.util.spec_from_file_location(name, repository / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return freeze(module.get_config())


def test_the_8b_step_lowers_with_every_large_parameter_sharded(repository):
    config = preset(repository, "llama8b")
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    mesh = make_mesh(config.mesh)
    factory = state_factory(config, mesh, 100)
    for path, leaf in jax.tree.leaves_with_path(factory.abstract):
        shard = np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if leaf.size * leaf.dtype.itemsize > 2**20:
            assert shard * 8 == leaf.size * leaf.dtype.itemsize, jax.tree_util.keystr(path)
    shape = RowShape(config.data.row_length, 2048, 16)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows_sharding(mesh)),
        abstract_batch(8, shape),
    )
    with jax.set_mesh(mesh):
        text = make_train_step(factory, 100).lower(factory.abstract, batch).as_text()
    assert "sdy.sharding_constraint" in text or "Sharding" in text


def test_two_logical_axes_cannot_share_a_mesh_axis():
    with pytest.raises(ValueError, match="share a mesh axis"):
        parameter_spec(("vocab", "mlp"))
