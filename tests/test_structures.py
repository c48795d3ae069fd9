# SPDX-License-Identifier: Apache-2.0
"""What blocks can be made of, beyond a plain Llama: decoding, branches, recomputation and added gradients agree."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import Config, ModelConfig, RopeScalingConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.attention import dispatch, splash, xla
from llm_jepa_jax.models.transformer import decode_step, forward, init_params, prefill
from llm_jepa_jax.resolve import resolve
from tests.conftest import SMALL_MODEL

PLAIN = ModelConfig(**SMALL_MODEL | {"num_layers": 3, "vocab_size": 64, "init_std": 0.2})
GEMMA = {
    "window": 6, "norm": "rms_plus_one", "norm_placement": "both", "scale_embeddings": True, "activation": "gelu_tanh",
    "attention_soft_cap": 2.0, "score_width": 12.0,
}  # fmt: skip
STRUCTURES = {
    "windows": {"window": 6, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "post": {"norm_placement": "post", "qk_norm": "full"},
    "alternating": GEMMA | {"window_pattern": "LG"},
    "two bases": GEMMA
    | {
        "window_pattern": "LLG", "local_rope_theta": 1e4, "qk_norm": "head", "rope_theta": 1e6,
        "rope_scaling": RopeScalingConfig("linear", 4.0),
    },
    "parallel": {
        "block": "parallel", "norm": "layer", "mlp_gated": False, "mlp_bias": True, "rope_share": 0.5,
        "head_bias": True,
    },
    "layers of their own": {
        "layer_heads": (2, 4, 6), "layer_kv_heads": (1, 4, 2), "layer_mlp_dims": (48, 32, 64), "num_heads": 6,
        "num_kv_heads": 4, "qk_norm": "head", "window": 6, "window_pattern": "LG",
    },
}  # fmt: skip
DTYPE = {"dtype": jnp.float32}


@pytest.fixture(scope="module", params=list(STRUCTURES))
def model(request):
    config = dataclasses.replace(PLAIN, **STRUCTURES[request.param])
    params = jax.jit(lambda key: init_params(key, config, jnp.float32))(jax.random.key(0))
    rng = np.random.default_rng(1)
    return config, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def run(model, tokens, **options):
    config, params = model
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    states = jax.jit(lambda params: forward(params, config, tokens, places, np.ones_like(tokens), **DTYPE, **options))
    return states(params)


def test_cached_decoding_equals_the_full_forward(model):
    config, params = model
    tokens = np.random.default_rng(0).integers(1, 64, (2, 24)).astype(np.int32)
    first = np.array([0, 5], np.int32)
    whole = [run(model, tokens[row : row + 1, first[row] :])[0] for row in range(2)]
    hidden, cache = jax.jit(lambda params: prefill(params, config, tokens[:, :12], first, 24, **DTYPE))(params)
    step = jax.jit(lambda token, slot, cache: decode_step(params, config, token, slot, first, cache, dtype=jnp.float32))
    for slot in range(12, 25):
        for row in range(2):
            np.testing.assert_allclose(hidden[row], whole[row][slot - 1 - first[row]], atol=3e-5)
        if slot < 24:
            hidden, cache = step(tokens[:, slot], slot, cache)


def test_a_branch_equals_the_same_tokens_behind_its_prefix(model):
    config, params = model
    tokens = np.random.default_rng(0).integers(1, 64, (1, 22)).astype(np.int32)
    end = 11
    positions = np.concatenate([np.arange(20), [end + 1, end + 2]])[None]
    row = (tokens, positions, np.ones((1, 20), np.int32), np.array([[end]]))
    ours = jax.jit(lambda params: forward(params, config, *row, **DTYPE))(params)
    inline = run(model, tokens[:, [*range(end + 1), 20, 21]])
    np.testing.assert_allclose(ours[:, 20:], inline[:, end + 1 :], atol=3e-5)


def test_recomputed_and_added_gradients_are_those_of_the_plain_model(model, monkeypatch):
    monkeypatch.setattr(xla, "BLOCK", 8)
    config, params = model
    tokens = np.random.default_rng(0).integers(1, 64, (2, 30)).astype(np.int32)

    def loss(params, sums=None, remat="none"):
        return (run((config, params), tokens, layer_sums=sums, remat=remat) ** 2).mean()

    expected = jax.jit(jax.grad(loss))(params)["layers"]
    zeros = jax.tree.map(jnp.zeros_like, params["layers"])
    added = jax.jit(jax.grad(lambda sums: loss(params, sums, "full")))(zeros)
    chex.assert_trees_all_close(added, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.parametrize("local", [True, False])
def test_a_layer_has_its_window_or_not_when_it_runs(backend, local):
    rng, width = np.random.default_rng(0), 64
    query, key, value = (jnp.asarray(rng.normal(size=(1, 256, n, width)), jnp.float32) for n in (2, 1, 1))
    segments = jnp.asarray(np.repeat([1, 2], [150, 106])[None], jnp.int32)
    if backend == "splash":
        kernels = [splash.attend(query, key, value, segments, 0, w, interpret=True) for w in (40, 0)]
        ours = jax.lax.cond(local, lambda: kernels[0], lambda: kernels[1])
    else:
        ours = jax.jit(lambda windowed: dispatch.attend(query, key, value, segments, "xla", 0, 40, 0.0, windowed))(
            local
        )
    expected = xla.attend(query, key, value, segments, 0, 40 if local else 0)
    np.testing.assert_allclose(ours, expected, atol=3e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 4, "window_pattern": "LX"}, "`model.window_pattern`='LX' is no pattern; use letters L and G"),
        ({"window_pattern": "LG"}, "`model.window_pattern`=LG has no effect with `model.window`=0; set the window"),
        ({"local_rope_theta": 5.0}, "`model.local_rope_theta`=5.0 has no effect with `model.window`=0"),
        (
            {"rope_scaling": RopeScalingConfig("linear", 2.0, beta_fast=8.0)},
            "`model.rope_scaling.beta_fast`=8.0 has no effect with `model.rope_scaling.kind`=linear",
        ),
        (
            {"rope_scaling": RopeScalingConfig("yarn", 2.0, beta_slow=32.0)},
            "`model.rope_scaling.beta_slow`=32.0 is not between 0 and `beta_fast`=32.0",
        ),
        (
            {"rope_scaling": RopeScalingConfig("yarn", 2.0, attention_factor=-1.0)},
            "`model.rope_scaling.attention_factor`=-1.0 is negative; use 0 for that of the paper",
        ),
        (
            {"rope_scaling": RopeScalingConfig("llama3", 2.0, low_freq_factor=4.0)},
            "`model.rope_scaling.low_freq_factor`=4.0 is not below `model.rope_scaling.high_freq_factor`=4.0",
        ),
        ({"block": "parallel", "norm_placement": "post"}, "`model.norm_placement`=post is not for `model.block`=para"),
        ({"rope_share": 0.1}, "`model.rope_share`=0.1 of `model.head_dim`=32 is no even number of places"),
    ],
)
def test_structures_that_contradict_themselves_are_refused(changes, words):
    with pytest.raises(UserError) as caught:
        resolve(dataclasses.replace(Config(), model=ModelConfig(**changes)), {})
    assert words in str(caught.value)
