# SPDX-License-Identifier: Apache-2.0
"""Adapters beside frozen weights: what is trained and what is not, what it costs, what is said of wrong settings."""

import dataclasses
import json
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.batch import RowShape, abstract_batch
from llm_jepa_jax.config import ModelConfig, freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.flops import model_flops
from llm_jepa_jax.main import run
from llm_jepa_jax.models.lora import abstract_frozen, frozen_from, init_adapters, joined
from llm_jepa_jax.models.quantized import Quantized, quantize, whole
from llm_jepa_jax.models.transformer import forward, init_params
from llm_jepa_jax.objectives.parameters import init_parameters
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import global_batch
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.train.state import saved_part, state_factory
from llm_jepa_jax.train.step import gradients, make_train_step
from tests.conftest import CACHE, REPOSITORY, host_batch, small_config, small_data

STEPS = 4
KINDS = {"float32": {}, "int8": {"base_dtype": "int8", "tile_size": 8}, "nf4": {"base_dtype": "nf4", "tile_size": 8}}


def lora_config(tmp_path, lora, **sections):
    return small_config(tmp_path, lora={"rank": 4, **lora}, **sections)


def steps_of(config, tokenizer, devices=1, steps=STEPS):
    """Losses of a few steps, the frozen tree before them, and the last state."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    config = resolve(config, mesh.shape)
    data, factory = small_data(config, tokenizer), state_factory(config, mesh, STEPS)
    state, losses = factory.create(), []
    before = jax.tree.map(np.array, state.frozen)
    step = make_train_step(factory, STEPS, data.kinds[0].row.longest_segment)
    with jax.set_mesh(mesh):
        for number in range(steps):
            state, metrics = step(state, global_batch(mesh, data.steps()[number]))
            losses.append(float(metrics["last"]["total_loss"]))
    return losses, before, state


@pytest.mark.parametrize("kind", ["float32", pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_only_adapters_and_predictors_move(tmp_path, tokenizer, kind):
    """The base stays as it is bit for bit, and the loss falls; the first one is that of the base alone."""
    sections = {"objective": {"jepa": {"linear_predictor": True}}, "opt": {"learning_rate": 0.01}}
    config = lora_config(tmp_path, KINDS[kind], **sections)
    losses, before, state = steps_of(config, tokenizer)
    chex.assert_trees_all_equal(jax.tree.map(np.array, state.frozen), before)
    start = init_parameters(jax.random.key(config.seed), config)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), start, state.params)
    assert min(jax.tree.leaves(moved)) > 0 and set(moved) == {"layers", "predictors"}
    assert losses[-1] < losses[0] - 0.2
    if kind == "float32":
        plain, *_ = steps_of(small_config(tmp_path, **sections), tokenizer, steps=1)
        assert losses[0] == plain[0]
    assert set(saved_part(state)) == {"step", "params", "opt_state", "skipped", "skipped_in_row"}


MECHANICS = (
    ({"data": 2, "fsdp": 2, "tensor": 2}, 8, {"remat": "full"}),
    ({"data": 1}, 1, {"micro_batches": 4, "remat": "dots"}),
    ({"data": 1, "fsdp": 2}, 2, {"micro_batches": 2}),
)
LAYOUTS = ("separate", "shared", "padded")
CROSSED = [
    pytest.param(*mechanics, layout, marks=[] if number == LAYOUTS.index(layout) else pytest.mark.slow)
    for number, mechanics in enumerate(MECHANICS)
    for layout in LAYOUTS
]
"""Each of the mechanics in a layout of its own; all with all are slow."""


@pytest.mark.parametrize(("mesh", "devices", "train", "layout"), CROSSED)
def test_devices_micro_batches_and_remat_change_nothing(tmp_path, tokenizer, mesh, devices, train, layout):
    """For a quantised base too, whose scales lie with it."""
    lora, data = KINDS["nf4" if layout == "shared" else "float32"], {"layout": layout}
    plain, _, state = steps_of(lora_config(tmp_path, lora, data=data), tokenizer, steps=2)
    config = lora_config(tmp_path, lora, data=data, mesh=mesh, train=train)
    other, _, other_state = steps_of(config, tokenizer, devices, steps=2)
    np.testing.assert_allclose(other, plain, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), state.params, other_state.params)
    assert max(jax.tree.leaves(moved)) < 2e-4  # Adam divides tiny gradients by themselves


def test_dropout_is_drawn_anew_by_step_and_micro_batch_and_not_in_evaluation(tmp_path, tokenizer):
    config = lora_config(tmp_path, {"dropout": 0.5})
    plain = lora_config(tmp_path, {})
    batch = jax.tree.map(lambda x: np.concatenate([x[:1]] * 2), host_batch(small_data(config, tokenizer)))
    frozen = frozen_from(init_params(jax.random.key(0), config.model, jnp.float32), config)
    params = jax.tree.map(lambda x: x + 0.05, init_adapters(jax.random.key(1), config))
    compiled = jax.jit(lambda b, c, step: gradients(params, b, c, step=step, frozen=frozen)[1], static_argnums=1)
    first, again, second = (compiled(batch, config, step) for step in (0, 0, 1))
    without = compiled(batch, plain, 0)
    chex.assert_trees_all_equal(first, again)
    name = "query_lora_a"
    assert np.abs(first["layers"][name] - second["layers"][name]).max() > 1e-5
    assert np.abs(first["layers"][name] - without["layers"][name]).max() > 1e-5
    # The two rows are equal, and so would be their micro-batches' gradients, if they dropped the same.
    cut = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batches=2))
    one = jax.tree.map(lambda x: x[:1], batch)
    alone = compiled(one, config, 0)["layers"][name]
    assert np.abs(compiled(batch, cut, 0)["layers"][name] - alone).max() > 1e-5


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_gradients_are_those_of_the_dequantised_base(tmp_path, tokenizer, kind):
    config = lora_config(tmp_path, KINDS[kind])
    batch = host_batch(small_data(config, tokenizer))
    frozen = frozen_from(init_params(jax.random.key(0), config.model, jnp.float32), config)
    params = jax.tree.map(lambda x: x + 0.05, init_adapters(jax.random.key(1), config))
    wide = jax.tree.map(lambda x: whole(x, jnp.float32), frozen, is_leaf=lambda x: isinstance(x, Quantized))
    compiled = jax.jit(lambda frozen, batch: gradients(params, batch, config, frozen=frozen)[:2])
    (total, grads), (expected, expected_grads) = compiled(frozen, batch), compiled(wide, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected_grads))
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-5, atol=1e-5 * largest)


def test_merged_weights_compute_the_same(tmp_path):
    """y = x W + scale · x A B, against W + scale · A B."""
    config = lora_config(tmp_path, {"alpha": 6.0, "rslora": True, "targets": "down, query,out"})
    base = init_params(jax.random.key(0), config.model, jnp.float32)
    adapters = jax.tree.map(lambda x: x + 0.05, init_adapters(jax.random.key(1), config))
    assert {name[: -len("_lora_a")] for name in adapters["layers"]} == {"query", "out", "down"}
    layers = dict(base["layers"])
    for name, inputs in (("query", 1), ("out", 2), ("down", 1)):
        a, b = adapters["layers"][f"{name}_lora_a"], adapters["layers"][f"{name}_lora_b"]
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(a, b)
        assert a.ndim == inputs + 2
        layers[name] = layers[name] + 6.0 / 4**0.5 * product
    tokens = np.random.default_rng(0).integers(0, 512, (2, 32))
    places, ones = np.tile(np.arange(32), (2, 1)), np.ones((2, 32), int)
    args = (config.model, tokens, places, ones)
    ours = forward(joined(adapters, frozen_from(base, config)), *args, dtype=jnp.float32)
    np.testing.assert_allclose(ours, forward(base | {"layers": layers}, *args, dtype=jnp.float32), atol=2e-5)


def test_codes_are_qwix_ones_and_their_error_is_bounded():
    qwix = pytest.importorskip("qwix")
    array = jax.random.normal(jax.random.key(0), (3, 128, 4, 16))
    for kind, step in (("int8", 0.5), ("nf4", 0.1519)):
        made = quantize(array, kind, 1, 32)
        qtype = kind if kind == "nf4" else jnp.int8
        theirs = qwix.quantize(array, qtype, channelwise_axes=(0, 2, 3), tiled_axes={1: 32}, scale_dtype=jnp.bfloat16)
        np.testing.assert_array_equal(whole(made, jnp.float32), qwix.dequantize(theirs.astype(jnp.float32)))
        scale = np.repeat(np.asarray(made.scale, np.float32), 32, axis=1)
        wrong = np.abs(np.asarray(whole(made, jnp.float32)) - array)
        assert (wrong <= step * scale + 2**-8 * np.abs(array)).all()  # half a gap, and the rounding of the scale
        assert 0.3 * step < (wrong / scale).max()
        few = dataclasses.replace(made, codes=made.codes[:1], scale=made.scale[:1])
        np.testing.assert_array_equal(whole(few, jnp.float32), whole(made, jnp.float32)[:1])


def test_codes_need_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"`lora.base_dtype`=nf4 needs qwix; `pip install 'llm_jepa_jax\[lora\]'`"):
        quantize(jnp.ones((4, 4)), "nf4", 0, 4)


def test_frozen_weights_take_two_thirds_of_the_arithmetic():
    model = ModelConfig(vocab_size=100)
    assert model_flops(model, 10, 10, 0, frozen=True) == pytest.approx(model_flops(model, 10, 10, 0) * 2 / 3)


def test_a_quantised_base_takes_a_quarter_and_an_eighth():
    config = freeze(
        {
            "model": {
                "embed_dim": 512,
                "head_dim": 64,
                "num_heads": 8,
                "num_kv_heads": 4,
                "vocab_size": 32,
                "mlp_dim": 1024,
            }
        }
    )
    sizes = {}
    for kind in ("float32", "int8", "nf4"):
        changed = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=8, base_dtype=kind))
        shapes, axes = abstract_frozen(changed)
        sizes[kind] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes["layers"]))
        chex.assert_trees_all_equal_structs(shapes, jax.tree.map(lambda *_: 0, shapes))
        assert jax.tree.structure(shapes) == jax.tree.structure(
            axes, is_leaf=lambda x: isinstance(x, tuple) and not isinstance(x, Quantized)
        )
    assert 3.8 < sizes["float32"] / sizes["int8"] < 4 and 7.3 < sizes["float32"] / sizes["nf4"] < 8


WIDE = {
    "vocab_size": 256, "embed_dim": 128, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64,
    "mlp_dim": 512,
}  # fmt: skip


def compiled_gradients(lora, remat, layers=9):
    """The compiled gradients of a wider model."""
    model = WIDE | {"num_layers": layers}
    values = {"model": model, "data": {"row_length": 128, "rows_per_step": 4}, "lora": lora}
    config = freeze(values | {"train": {"remat": remat}})
    params = jax.eval_shape(lambda: init_parameters(jax.random.key(0), config))
    run = jax.jit(lambda p, f, b: gradients(p, b, config, frozen=f)[1])
    return run.lower(params, abstract_frozen(config)[0], abstract_batch(4, RowShape(128, 128, 2))).compile()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_base_has_no_gradient(remat):
    """Two thirds of the work are left, or three quarters with recomputation, and no array as large as the weights."""
    whole_model, adapters = compiled_gradients({}, remat), compiled_gradients({"rank": 1}, remat)
    flops = [compiled.cost_analysis()["flops"] for compiled in (adapters, whole_model)]
    assert flops[0] / flops[1] < (0.78 if remat == "none" else 0.85)
    memory = [compiled.memory_analysis() for compiled in (adapters, whole_model)]
    assert memory[0].output_size_in_bytes < 0.1 * memory[1].output_size_in_bytes
    used = [m.temp_size_in_bytes + m.output_size_in_bytes for m in memory]
    assert used[0] < used[1] - 0.5 * memory[1].output_size_in_bytes


def test_a_quantised_base_is_read_layer_by_layer():
    """Without recomputation of anything else, the backward pass still keeps no layer's weights in full: a further layer
    takes no more memory than beside an exact base."""
    more = []
    for kind in ("nf4", "float32"):
        lora = {"rank": 1, "base_dtype": kind}
        few, many = (compiled_gradients(lora, "none", layers).memory_analysis() for layers in (9, 12))
        more.append((many.temp_size_in_bytes - few.temp_size_in_bytes) / 3)
    a_layer = 4 * (4 * 128 * 128 + 3 * 128 * 512)
    assert more[0] < more[1] + 0.1 * a_layer, more


SMOKE = "--config=configs/tiny.py:smoke"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lora.dropout=0.1"], "`lora.dropout`=0.1 has no effect with `lora.rank`=0; set the rank"),
        (["lora.rank=-1"], "must not be negative"),
        (["lora.rank=4", "lora.targets=query,q_proj"], "names 'q_proj', which this model has not; use some of query"),
        (["lora.rank=4", "lora.targets=query,query"], "names 'query' twice"),
        (["lora.rank=4", "lora.dropout=1.0"], "must be 0 or more and below 1"),
        (["lora.rank=4", "lora.alpha=0.0"], "must be above 0"),
        (["lora.rank=4", "lora.base_dtype=int4"], "use one of , float32, bfloat16, int8, nf4"),
        (["lora.rank=4", "lora.tile_size=32"], "has no effect unless `lora.base_dtype` is int8 or nf4"),
        (["lora.rank=4", "lora.base_dtype=nf4"], "`lora.tile_size`=64 does not divide `model.head_dim`=16; use a"),
        (["lora.rank=4", "lora.base_dtype=nf4", "lora.tile_size=2"], "is odd or below 4"),
        (["lora.adapter=/nowhere"], "needs its base; set `init.checkpoint`"),
    ],
)
def test_contradictions_are_refused(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError) as caught:
        run(["main", SMOKE, f"--workdir={tmp_path}/run", *(f"--config.{argument}" for argument in arguments)])
    assert words in str(caught.value) and "\n" not in str(caught.value)


QUICK = (
    "main", f"--config={REPOSITORY}/configs/tiny.py:smoke", "--config.log.report=False",
    "--config.log.tensorboard=False", "--config.eval.final_examples=2", f"--config.train.compile_cache={CACHE}",
    "--config.eval.max_new_tokens=2", "--config.checkpoint.every_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run that trained all its weights, and its published directory."""
    place = tmp_path_factory.mktemp("base")
    run([*QUICK, "--config.train.num_steps=1", f"--workdir={place}/run"])
    run(["main", "--mode=export", f"--workdir={place}/run", f"--out={place}/published"])
    return place


def leaves_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_command_line_trains_resumes_evaluates_and_exports(base, tmp_path):
    """Beside a published model: new rows of tokens, a quantised base, both exports, a base that moves and one that
    changes."""
    lora = [
        "--config.lora.rank=4", "--config.lora.base_dtype=nf4", "--config.lora.tile_size=16",
        "--config.lora.dropout=0.1",
        f"--config.text.tokenizer={base}/run/tokenizer.model", "--config.objective.jepa.linear_predictor=True",
        "--config.model.vocab_size=520", "--config.init.new_rows=normal", "--config.train.num_steps=4",
    ]  # fmt: skip
    argv = [*QUICK, *lora, f"--config.init.checkpoint={base}/published"]
    result = run([*argv, f"--workdir={tmp_path}/whole"])
    assert result["step"] == 4
    saved = json.loads((tmp_path / "whole" / "checkpoints" / "4" / "state" / "_METADATA").read_text())["tree_metadata"]
    arrays = [name for name, value in saved.items() if value["value_metadata"].get("write_shape")]
    assert len(arrays) == 3 * (2 * 7 + 1) and all("_lora_" in name or "predictors" in name for name in arrays)
    lm = lj.load(tmp_path / "whole")
    assert lm.run.config.model.vocab_size == 520 and "jepa" in lm.run.params["predictors"]
    again = lj.load(tmp_path / "whole")
    leaves_equal(lm.run.params, again.run.params)
    assert run(["main", "--mode=eval", f"--workdir={tmp_path}/whole"])["exact_match"] == result["exact_match"]

    (tmp_path / "cut").mkdir()
    for name in ("config.json", "run.json", "tokenizer.model"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "whole" / "checkpoints" / "3").rename(tmp_path / "kept")
    (tmp_path / "cut" / "checkpoints").mkdir()
    (tmp_path / "kept").rename(tmp_path / "cut" / "checkpoints" / "3")
    run([*argv, f"--workdir={tmp_path}/cut"])
    leaves_equal(lj.load(tmp_path / "cut").run.params, lm.run.params)

    run(["main", "--mode=export", f"--workdir={tmp_path}/whole", f"--out={tmp_path}/merged"])
    run(["main", "--mode=export", "--format=peft", f"--workdir={tmp_path}/whole", f"--out={tmp_path}/adapter"])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["base_model_name_or_path"] == f"{base}/published"
    ids = [[3, 7, 300, 515]]
    merged = lj.load(tmp_path / "merged")
    exact = np.abs(merged.logits(ids)[0] - lm.logits(ids)[0]).max() / np.abs(lm.logits(ids)[0]).max()
    assert 1e-4 < exact < 0.3  # 4-bit codes against the weights that they stand for

    (base / "published").rename(base / "moved")
    try:
        with pytest.raises(UserError, match=r"adapters need the weights .* set --config.init.checkpoint to where they"):
            lj.load(tmp_path / "whole")
        moved = f"--config.init.checkpoint={base}/moved"
        assert run(["main", "--mode=eval", f"--workdir={tmp_path}/whole", moved])["step"] == 4
        with pytest.raises(UserError, match=r"were trained beside other weights than those of `init.checkpoint`="):
            run(["main", "--mode=eval", f"--workdir={tmp_path}/whole", f"--config.init.checkpoint={tmp_path}/merged"])
    finally:
        (base / "moved").rename(base / "published")


@pytest.mark.slow
def test_a_runs_weights_are_a_base_too(base, tmp_path):
    """The step is kept, adapters of such a run cannot be another one's base, and PEFT cannot open them."""
    argv = [*QUICK, "--config.lora.rank=2", "--config.lora.targets=query,value", "--config.train.num_steps=1"]
    run([*argv, f"--config.init.checkpoint={base}/run", f"--workdir={tmp_path}/lora"])
    lm = lj.load(tmp_path / "lora")
    assert lm.run.config.init.step == 1
    before = lj.load(base / "run").run.params
    leaves_equal(lm.run.params["embedding"], before["embedding"])
    leaves_equal(lm.run.params["layers"]["down"], before["layers"]["down"])
    with pytest.raises(UserError, match="is a run that trained adapters; write its model with --mode=export"):
        run([*argv, f"--config.init.checkpoint={tmp_path}/lora", f"--workdir={tmp_path}/more"])
    with pytest.raises(UserError, match="--format=peft: the adapters lie beside a run's weights"):
        lm.save_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match="--format=peft: the run trained all weights"):
        lj.load(base / "run").save_adapter(tmp_path / "adapter")
    lm.save_hf(tmp_path / "merged")
    ids = [[3, 7, 300, 415]]
    np.testing.assert_allclose(lj.load(tmp_path / "merged").logits(ids)[0], lm.logits(ids)[0], atol=1e-4)
