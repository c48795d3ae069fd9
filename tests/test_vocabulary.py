# SPDX-License-Identifier: Apache-2.0
"""A vocabulary that is padded to the mesh: the padding has no probability, no gradient, and no way out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.batch import Batch
from llm_jepa_jax.checkpoint.hf_export import ExportSettings, export
from llm_jepa_jax.checkpoint.manager import Checkpoints
from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS
from llm_jepa_jax.config import CheckpointConfig, MeshConfig, ModelConfig
from llm_jepa_jax.eval.generate import Generator
from llm_jepa_jax.models.transformer import init_params
from llm_jepa_jax.objectives.head import HeadSettings, cross_entropy
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step
from tests.conftest import SMALL_MODEL, small_config, small_data
from tests.test_head import VOCABULARY, case
from tests.test_step import losses_of

IDS = 515
UNTIED = {"vocab_size": IDS, "tie_embeddings": False, "head_bias": True}


def padding(params, ids=IDS):
    """What lies behind the ids, of every parameter with a vocabulary."""
    return [np.asarray(leaf).take(range(ids, leaf.shape[axis]), axis) for leaf, axis in found(params)]


def found(params):
    return [(params[name], axis) for name, axis in VOCABULARY_AXIS.items() if name in params]


def cut(params, ids=IDS):
    kept = {name: np.asarray(params[name]).take(range(ids), axis) for name, axis in VOCABULARY_AXIS.items()
            if name in params}  # fmt: skip
    return params | kept


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}])
@pytest.mark.parametrize(("z_loss", "soft_cap"), [(0.0, 0.0), (1e-2, 3.0)])
def test_any_padding_leaves_loss_and_gradients_and_gets_none(mesh, z_loss, soft_cap):
    """Even of the largest logits there are, and where a device has nothing but padding."""
    hidden, head, *slots = case()
    rng = np.random.default_rng(1)
    bias = jnp.asarray(rng.normal(size=VOCABULARY), jnp.float32)
    junk = 100.0 * rng.normal(size=(head.shape[0], 64))
    wide = jnp.concatenate([head, jnp.asarray(junk, jnp.float32)], axis=1)
    wide_bias = jnp.concatenate([bias, jnp.full(64, 50.0)])
    settings = HeadSettings(5, z_loss, soft_cap)

    def value_and_grads(head, bias, settings):
        ours = jax.value_and_grad(lambda h, w, b: cross_entropy(h, w, *slots, settings, b), (0, 1, 2))
        return jax.jit(ours)(hidden, head, bias)

    with jax.set_mesh(make_mesh(MeshConfig(**mesh), jax.devices()[: 8 if len(mesh) > 1 else 1])):
        expected, expected_grads = value_and_grads(head, bias, settings)
        value, grads = value_and_grads(wide, wide_bias, dataclasses.replace(settings, num_ids=VOCABULARY))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads[0], expected_grads[0], rtol=1e-5, atol=1e-6)
    for grad, other in zip(grads[1:], expected_grads[1:], strict=True):
        np.testing.assert_allclose(grad[..., :VOCABULARY], other, rtol=1e-5, atol=1e-6)
        assert not np.asarray(grad[..., VOCABULARY:]).any()


@pytest.mark.parametrize(
    ("model", "options", "devices"),
    [
        (UNTIED, {"train": {"micro_batches": 2}, "opt": {"weight_decay": 0.5}}, 1),
        (
            {"vocab_size": IDS},
            {
                "mesh": {"data": 2, "tensor": 2},
                "opt": {"second_moment": "factored"},
                "objective": {"ntp": {"z_loss": 0.1}},
            },
            4,
        ),
    ],
)
def test_training_is_that_without_padding(tmp_path, tokenizer, model, options, devices):
    model, opt = model | {"num_layers": 1}, {"learning_rate": 3e-3} | options.get("opt", {})
    plain = small_config(tmp_path, **options | {"model": model | {"vocab_multiple": 1}, "mesh": {}, "opt": opt})
    losses, params = losses_of(plain, tokenizer, 1)
    assert params["embedding"].shape[0] == IDS
    others, other = losses_of(small_config(tmp_path, **options | {"model": model, "opt": opt}), tokenizer, devices)
    assert other["embedding"].shape[0] == 640
    np.testing.assert_allclose(others[0], losses[0], rtol=1e-6)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    assert not any(rows.any() for rows in padding(other))
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), params, cut(other))
    assert max(jax.tree.leaves(moved)) < 1e-3  # Adam divides tiny gradients by themselves


def test_nothing_padded_is_the_same_compiled_step(tmp_path, tokenizer):
    texts = []
    for multiple in (1, 128):
        config = small_config(tmp_path, model={"vocab_multiple": multiple})
        data = small_data(config, tokenizer)
        factory = state_factory(config, make_mesh(config.mesh), 4)
        batch = jax.tree.map(jnp.asarray, {k: v for k, v in data.steps()[0].items() if k != "kind"})
        with jax.set_mesh(factory.mesh):
            texts.append(make_train_step(factory, 4).lower(factory.abstract, Batch(**batch)).as_text())
    assert texts[0] == texts[1]


def test_a_checkpoint_moves_between_paddings(tmp_path):
    """Parameters and moments alike; a shape that is no padding still must be the stored one."""
    states = {}
    for multiple in (128, 24):
        config = small_config(tmp_path, model=UNTIED | {"vocab_multiple": multiple}, mesh={"fsdp": 4, "data": 2})
        states[multiple] = state_factory(config, make_mesh(config.mesh), 4)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    state = states[24].create()
    checkpoints.save(1, state, {})
    for factory in states.values():
        _, restored, _ = checkpoints.restore_latest(factory.abstract)
        assert not any(rows.any() for rows in padding(restored.params))
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
            same = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
            np.testing.assert_array_equal(np.asarray(old)[same], np.asarray(new)[same])
    other = small_config(tmp_path, model=UNTIED | {"mlp_dim": 128})
    assert checkpoints.restore_latest(state_factory(other, make_mesh(other.mesh), 4).abstract) is None
    checkpoints.close()


def test_padding_is_never_chosen_shown_or_exported(tmp_path, tokenizer):
    """Whatever lies in it."""
    model = ModelConfig(**SMALL_MODEL | UNTIED | {"head_bias": False}, family="llama")
    params, mesh = init_params(jax.random.key(0), model, jnp.float32), make_mesh(MeshConfig(tensor=2))
    assert params["head"].shape == (32, 640)
    params["embedding"], params["head"] = params["embedding"].at[IDS:].set(9.0), params["head"].at[:, IDS:].set(9.0)
    export(params, model, mesh, tmp_path / "m", ExportSettings())
    lm = lj.load(tmp_path / "m")
    assert lm.run.config.model == model and lm.run.params["head"].shape == (32, 640)
    np.testing.assert_array_equal(lm.run.params["head"], params["head"].at[:, IDS:].set(0.0))
    junk = dataclasses.replace(lm, run=dataclasses.replace(lm.run, params=params))
    ids = [[5, 6, 7, 8]]
    assert junk.logits(ids)[0].shape == (4, IDS)
    np.testing.assert_allclose(junk.logits(ids)[0], lm.logits(ids)[0], atol=1e-5)
    generator = Generator(model, tokenizer, mesh, 4, 1, jnp.float32)
    assert generator(params, ids) == generator(lm.run.params, ids) and max(generator(params, ids)[0][0]) < 512
