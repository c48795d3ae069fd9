# SPDX-License-Identifier: Apache-2.0
"""What all prompts begin with is encoded once, and nothing else changes."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import MeshConfig, ModelConfig, RopeScalingConfig
from llm_jepa_jax.eval import generate
from llm_jepa_jax.eval.generate import Generator, Vocabulary, shared_length
from llm_jepa_jax.eval.sampling import Sampling
from llm_jepa_jax.models.transformer import decode_step, init_params, prefill
from llm_jepa_jax.parallel.mesh import make_mesh
from tests.conftest import SMALL_MODEL

MODELS = {
    "plain": {},
    "windows of 24 in every other layer, soft caps, two rotary bases": {
        "window": 24, "window_pattern": "LG", "attention_soft_cap": 2.0, "local_rope_theta": 10000.0,
        "logit_soft_cap": 3.0, "norm_placement": "both", "qk_norm": "head",
    },
    "windows of 40 in all layers, yarn": {
        "window": 40, "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 64},
    },
    "layers of different shapes": {"layer_heads": (2, 4), "layer_kv_heads": (1, 2), "layer_mlp_dims": (32, 64)},
    "parallel blocks": {"block": "parallel", "norm": "layer", "qkv_bias": True, "rope_share": 0.5},
}  # fmt: skip
SHARED, OWN, STEPS = 64, (1, 40, 64, 17), 2


def model_of(changes):
    changes = dict(changes)
    if "rope_scaling" in changes:
        changes["rope_scaling"] = RopeScalingConfig(**changes["rope_scaling"])
    return ModelConfig(**SMALL_MODEL | {"init_std": 0.15} | changes)


@functools.partial(jax.jit, static_argnames=("model", "shared"))
def states(params, tokens_BxS, first_slot_B, new_BxT, *, model, shared):
    """Hidden states behind the prompts and behind each of the tokens after them [B, 1 + T, D]."""
    width, prefix = tokens_BxS.shape[1] + shared, None
    if shared:
        prefix_1xP = tokens_BxS[:1, :shared]
        _, prefix = prefill(params, model, prefix_1xP, jnp.zeros(1, jnp.int32), shared, dtype=jnp.float32)
        tokens_BxS, width = tokens_BxS[:, shared:], tokens_BxS.shape[1]
    num_slots = width + new_BxT.shape[1]
    hidden, cache = prefill(params, model, tokens_BxS, first_slot_B, num_slots, prefix, dtype=jnp.float32)
    found = [hidden]
    for step in range(new_BxT.shape[1]):
        hidden, cache = decode_step(
            params, model, new_BxT[:, step], width + step, first_slot_B, cache, dtype=jnp.float32
        )
        found.append(hidden)
    return jnp.stack(found, axis=1)


SLOW = ("plain", "windows of 40 in all layers, yarn", "parallel blocks")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def test_states_are_those_of_whole_prompts(name):
    """Behind prompts of many lengths and behind the next tokens; and whatever lies in the padding."""
    model, rng = model_of(MODELS[name]), np.random.default_rng(0)
    params = init_params(jax.random.key(3), model, jnp.float32)
    width = SHARED + max(OWN)
    prefix, new = rng.integers(0, 512, SHARED), rng.integers(0, 512, (len(OWN), STEPS)).astype(np.int32)
    first = width - SHARED - np.array(OWN, np.int32)
    found = []
    for pad in (0, 511):
        whole, apart = np.full((2, len(OWN), width), pad, np.int32)
        apart[:, :SHARED] = prefix
        for row, own in enumerate(OWN):
            tokens = np.random.default_rng(row).integers(0, 512, own)
            whole[row, first[row] :] = np.concatenate([prefix, tokens])
            apart[row, width - own :] = tokens
        expected = states(params, whole, first, new, model=model, shared=0)
        found.append(states(params, apart, first, new, model=model, shared=SHARED))
        np.testing.assert_allclose(found[-1], expected, atol=1e-5)
    np.testing.assert_array_equal(*found)
    assert float(jnp.std(found[0])) > 0.1


CONFIG = model_of(MODELS["windows of 24 in every other layer, soft caps, two rotary bases"])
PARAMS = init_params(jax.random.key(3), CONFIG, jnp.float32)


def prompts(count=20):
    rng = np.random.default_rng(1)
    prefix = rng.integers(0, 512, 70).tolist()
    return [prefix + rng.integers(0, 512, 1 + 2 * i).tolist() for i in range(count)]


MESHES = {
    "1": (1, {}, 0),
    "8": (8, {}, 8),
    "fsdp, tensor": (8, {"fsdp": 2, "tensor": 2, "data": 2}, 0),
    "context": (4, {"context": 2, "data": 2}, 8),
}
"""Devices, sizes of the mesh, batch size."""
GREEDY, SAMPLED = Sampling(), Sampling(1.0, 50, 0.9)
FAST = (("1", SAMPLED), ("fsdp, tensor", SAMPLED))
EVERY = [(mesh, sampling) for mesh in MESHES for sampling in (GREEDY, SAMPLED)]


@functools.cache
def answers_alone(sampling):
    """One prompt at a time, each read whole."""
    patched = pytest.MonkeyPatch()
    patched.setattr(generate, "SHARED_PAYS", 10**9)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    found = Generator(CONFIG, Vocabulary(512, (7,)), mesh, 6, 1, jnp.float32, sampling)(PARAMS, prompts(), seed=5)
    patched.undo()
    return found


@pytest.mark.parametrize(
    ("mesh", "sampling"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in EVERY],
    ids=[f"{mesh}-{'sampled' if sampling.temperature else 'greedy'}" for mesh, sampling in EVERY],
)
def test_answers_are_those_of_each_prompt_alone(monkeypatch, caplog, mesh, sampling):
    """Bit-equal tokens, in another order too, on meshes of every kind."""
    expected, order = answers_alone(sampling), np.random.default_rng(2).permutation(20)
    devices, sizes, batch_size = MESHES[mesh]
    caplog.set_level(logging.INFO, "llm_jepa_jax")
    monkeypatch.setattr(generate, "SHARED_PAYS", 64)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
    make = Generator(CONFIG, Vocabulary(512, (7,)), mesh, 6, batch_size, jnp.float32, sampling)
    found = make(PARAMS, [prompts()[i] for i in order], seed=5)
    assert "64 tokens that all prompts begin with are encoded once" in caplog.text
    assert found == [expected[i] for i in order]
    assert len({tuple(answer) for answer, _ in expected}) > 15


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3, 9]], 2), ([[1, 2], [1, 2], [1, 2]], 1), ([[1], [1, 2, 3]], 0),
        ([[3, 1, 2], [1, 2, 3]], 0), ([np.array([5, 6, 7]), (5, 6, 8), [5, 6, 7, 7]], 2),
    ],
)  # fmt: skip
def test_every_prompt_keeps_a_token_of_its_own(prompts, length):
    assert shared_length(prompts) == length
