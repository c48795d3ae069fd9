# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import importlib.util
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import ModelConfig, RopeScalingConfig, freeze
from llm_jepa_jax.models import layers
from llm_jepa_jax.models.attention import xla
from llm_jepa_jax.models.families.registry import family_of
from llm_jepa_jax.models.ops import apply_rotary, fenced, linear, rotary_frequencies, with_fenced_gradients
from llm_jepa_jax.models.transformer import (
    abstract_params,
    count_params,
    decode_step,
    forward,
    head_kernel,
    init_params,
    prefill,
)
from llm_jepa_jax.models.weaving import with_spare_branch
from tests.conftest import SMALL_MODEL

CONFIG = ModelConfig(**SMALL_MODEL)
PARAMS = jax.jit(lambda key: init_params(key, CONFIG, jnp.float32))(jax.random.key(0))
LENGTHS = (5, 17, 9, 20)


def packed(lengths=LENGTHS, length=64):
    """One row of segments with these lengths, then padding."""
    tokens = np.random.default_rng(0).integers(1, 512, length).astype(np.int32)
    segments, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    place = 0
    for number, size in enumerate(lengths, start=1):
        segments[place : place + size] = number
        positions[place : place + size] = np.arange(size)
        place += size
    return tokens[None], positions[None], segments[None]


@functools.partial(jax.jit, static_argnames=("dtype", "longest_segment"))
def run(params, tokens, positions, segments, **options):
    """Hidden states [R, L, D], compiled once a shape."""
    return forward(params, CONFIG, tokens, positions, segments, **{"dtype": jnp.float32} | options)


def hidden_of(embedding_LxD, row, longest):
    """Hidden states [L, D] as a function of the row's own token embeddings, through a table of one row a place."""
    _, positions, segments = row
    params = PARAMS | {"embedding": embedding_LxD}
    places = np.arange(positions.shape[1], dtype=np.int32)[None]
    config = dataclasses.replace(CONFIG, vocab_size=positions.shape[1], vocab_multiple=1)
    return forward(params, config, places, positions, segments, dtype=jnp.float32, longest_segment=longest)[0]


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("longest", [0, 20])
def test_no_gradient_from_a_later_token_another_segment_or_padding(monkeypatch, block, longest):
    """By gradient: a place's state depends on exactly the earlier places of its own segment."""
    monkeypatch.setattr(xla, "BLOCK", block)
    row = packed(length=64)
    embedding = PARAMS["embedding"][row[0][0]]
    directions = np.random.default_rng(1).normal(size=CONFIG.embed_dim).astype(np.float32)
    jacobian = jax.jit(jax.jacrev(lambda e: hidden_of(e, row, longest) @ directions))(embedding)
    depends = np.abs(np.asarray(jacobian)).sum(-1) > 0
    segments = row[2][0]
    expected = np.tril(segments[:, None] == segments[None, :])
    real = segments > 0
    np.testing.assert_array_equal(depends[real], expected[real])
    assert np.isfinite(np.asarray(jacobian)).all()


@pytest.mark.parametrize("longest", [0, 20])
def test_a_branch_depends_on_its_prefix_and_its_own_earlier_tokens_only(monkeypatch, longest):
    monkeypatch.setattr(xla, "BLOCK", 4)
    tokens, positions, segments = packed(length=64)
    branch_end, k = np.array([[8, 30, 3]], np.int32), 2
    positions = np.concatenate([positions, [[p + i for p in positions[0, branch_end[0]] for i in (1, 2)]]], axis=1)
    embedding = jax.random.normal(jax.random.key(2), (70, CONFIG.embed_dim))
    config = dataclasses.replace(CONFIG, vocab_size=70, vocab_multiple=1)

    def states(embedding):
        places = np.arange(70, dtype=np.int32)[None]
        params = PARAMS | {"embedding": embedding}
        return forward(
            params, config, places, positions, segments, branch_end, dtype=jnp.float32, longest_segment=longest
        )[0]

    directions = np.random.default_rng(1).normal(size=CONFIG.embed_dim).astype(np.float32)
    jacobian = jax.jit(jax.jacrev(lambda e: states(e) @ directions))(embedding)
    depends = np.abs(np.asarray(jacobian)).sum(-1) > 0
    expected = np.zeros((70, 70), bool)
    expected[:64, :64] = np.tril(segments[0][:, None] == segments[0][None, :])
    for branch, end in enumerate(branch_end[0]):
        for i in range(k):
            query = 64 + branch * k + i
            expected[query, :64] = (segments[0] == segments[0][end]) & (np.arange(64) <= end)
            expected[query, 64 + branch * k : query + 1] = True
    real = np.concatenate([segments[0] > 0, np.ones(6, bool)])
    np.testing.assert_array_equal(depends[real], expected[real])


@pytest.mark.parametrize("longest", [0, 20])
def test_packed_segments_equal_segments_alone(longest):
    tokens, positions, segments = packed()
    whole = run(PARAMS, tokens, positions, segments, longest_segment=longest)
    place = 0
    for size in LENGTHS:
        here = slice(place, place + size)
        alone = run(PARAMS, tokens[:, here], np.arange(size)[None], np.ones((1, size), np.int32))
        np.testing.assert_allclose(whole[0, here], alone[0], atol=2e-6)
        place += size


def test_linear_has_the_gradient_of_its_einsum():
    x, weight = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)), jax.random.normal(jax.random.key(1), (4, 5, 6))
    ours = jax.grad(lambda x, w: (linear(x, w) ** 3).sum(), (0, 1))(x, weight)
    plain = jax.grad(lambda x, w: (jnp.einsum("rlnh,nhd->rld", x, w) ** 3).sum(), (0, 1))(x, weight)
    chex.assert_trees_all_close(ours, plain, rtol=1e-4)


@pytest.mark.parametrize("remat", ["dots", "hidden", "full"])
def test_remat_changes_nothing(remat):
    row = packed()

    def loss(params, policy):
        return (forward(params, CONFIG, *row, dtype=jnp.float32, remat=policy) ** 2).sum()

    plain, again = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(PARAMS, policy) for policy in ("none", remat))
    chex.assert_trees_all_close(plain, again, rtol=1e-5, atol=1e-5)


def test_cached_decoding_equals_the_full_forward():
    tokens = np.random.default_rng(0).integers(1, 512, (2, 24)).astype(np.int32)
    first = np.array([0, 5], np.int32)
    whole = []
    for row in range(2):
        alone = tokens[row : row + 1, first[row] :]
        length = alone.shape[1]
        whole.append(run(PARAMS, alone, np.arange(length)[None], np.ones((1, length), np.int32))[0])
    hidden, cache = prefill(PARAMS, CONFIG, tokens[:, :12], first, 24, dtype=jnp.float32)
    step = jax.jit(lambda token, slot, cache: decode_step(PARAMS, CONFIG, token, slot, first, cache, dtype=jnp.float32))
    for slot in range(12, 25):
        for row in range(2):
            np.testing.assert_allclose(hidden[row], whole[row][slot - 1 - first[row]], atol=1e-5)
        if slot < 24:
            hidden, cache = step(tokens[:, slot], slot, cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rotated", [16, 8])
def test_rotation_by_a_product_is_that_by_halves(dtype, rotated):
    """Value and gradient to the last bit, of whole heads and of a part; and the gradient is that of the formula."""
    x_key, angle_key, grad_key = jax.random.split(jax.random.key(0), 3)
    x_RxLxHxh = jax.random.normal(x_key, (2, 5, 3, 16)).astype(dtype)
    grad_RxLxHxh = jax.random.normal(grad_key, x_RxLxHxh.shape).astype(dtype)
    angles = jax.random.normal(angle_key, (2, 5, rotated // 2))
    tables = jnp.cos(angles), jnp.sin(angles)

    def formula(x):
        cos, sin = (table[:, :, None, :] for table in tables)
        first, second, rest = jnp.split(x.astype(jnp.float32), (rotated // 2, rotated), axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(dtype)

    def both(rotate):
        out, pull = jax.vjp(rotate, x_RxLxHxh)
        return out, pull(grad_RxLxHxh)[0]

    expected = both(formula)
    for by_product in (False, True):
        found = both(lambda x, by_product=by_product: apply_rotary(x, tables, by_product))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    found = both(lambda x: layers.rotated(x, tables, x_RxLxHxh.shape[1] - 3))  # three places of branches
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_on_tpus_a_norm_is_fenced_off_from_products():
    """The barriers change no number, of the norm or of its gradient, and are not where XLA computes attention."""
    x = jax.random.normal(jax.random.key(0), (4, 16))
    expected, found = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (lambda x: x, fenced))
    np.testing.assert_array_equal(found, expected)
    config = dataclasses.replace(CONFIG, head_dim=64)
    shapes, tokens = abstract_params(config, jnp.float32)[0], jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def loss(params, tokens, backend):
        return forward(params, config, tokens, tokens, tokens, dtype=jnp.float32, attention=backend).sum()

    for backend in ("splash", "xla"):
        of = functools.partial(loss, backend=backend)
        for function in (of, jax.grad(of)):
            assert ("optimization_barrier" in str(jax.make_jaxpr(function)(shapes, tokens))) == (backend == "splash")


def test_a_spare_branch_changes_nothing_of_a_row():
    segments = jnp.ones((2, 24), jnp.int32)
    tokens, positions = jax.random.randint(jax.random.key(1), (2, 24), 0, 50), jnp.broadcast_to(jnp.arange(24), (2, 24))
    spare = with_spare_branch(tokens, positions)
    rows = (tokens, positions, segments), (*spare[:2], segments, spare[2])
    expected, found = (forward(PARAMS, CONFIG, *row, dtype=jnp.float32) for row in rows)
    np.testing.assert_allclose(found[:, :24], expected, rtol=1e-5, atol=1e-5)


def test_fenced_gradients_are_the_gradients():
    x = jax.random.normal(jax.random.key(0), (4, 16))

    def swiglu(gate, up, fence):
        gate, up = fence((gate, up))
        return jnp.sum(jax.nn.silu(gate) * up)

    expected, found = (
        jax.grad(swiglu, (0, 1))(x, 2 * x, fence) for fence in (lambda pair: pair, with_fenced_gradients)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_llama31_frequencies_follow_the_published_rule():
    """Wavelengths below 8192 / 4 are kept, above 8192 / 1 divided by the factor, blended between."""
    config = dataclasses.replace(CONFIG, head_dim=128, rope_scaling=RopeScalingConfig(factor=8.0))
    scaled, plain = rotary_frequencies(config), rotary_frequencies(dataclasses.replace(CONFIG, head_dim=128))
    kinds = set()
    for old, new in zip(plain.astype(float), scaled.astype(float), strict=True):
        wavelength = 2 * math.pi / old
        if wavelength < 8192 / 4:
            expected, kind = old, "kept"
        elif wavelength > 8192:
            expected, kind = old / 8, "divided"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected, kind = (1 - smooth) * old / 8 + smooth * old, "blended"
        kinds.add(kind)
        assert new == pytest.approx(expected, rel=1e-5)
    assert kinds == {"kept", "divided", "blended"}


def test_half_precision_stays_near_and_parameters_stay_wide():
    row = packed()
    wide, narrow = (run(PARAMS, *row, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    used = row[2][0] > 0
    error = jnp.abs(narrow[0, used].astype(jnp.float32) - wide[0, used]).mean() / jnp.abs(wide[0, used]).mean()
    assert 1e-6 < error < 0.03
    grads = jax.jit(jax.grad(lambda p: run(p, *row, dtype=jnp.bfloat16).astype(jnp.float32).sum()))(PARAMS)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("llama1b", 1_235_814_400),
        ("llama3b", 3_212_749_824),
        ("llama8b", 8_030_261_248),
        ("llama70b", 70_553_706_496),
        ("llama405b", 405_853_388_800),
        ("gemma2_2b", 2_614_341_888),
        ("olmo2_1b", 1_484_916_736),
        ("olmo2_7b", 7_298_617_344),
        ("qwen3_1_7b", 1_720_574_976),
        ("r1_distill_qwen_1_5b", 1_777_088_000),
        ("phi1_5", 1_418_270_720),
        ("openelm_1b", 1_079_891_456),
    ],  # fmt: skip
)
def test_presets_have_the_published_parameter_counts(repository, preset, published):
    spec = importlib.util.spec_from_file_location(preset, repository / "configs" / f"{preset}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = freeze(module.get_config()).model
    assert count_params(abstract_params(model, jnp.float32)[0]) == published


def golden_model(shared_dir):
    """The reference's tiny Llama: configuration, parameters, and its arrays."""
    safetensors = pytest.importorskip("safetensors.numpy")
    directory = shared_dir / "goldens"
    hf = json.loads((directory / "tiny_llama" / "config.json").read_text())
    weights = safetensors.load_file(directory / "tiny_llama" / "model.safetensors")
    config = ModelConfig(
        vocab_size=hf["vocab_size"], embed_dim=hf["hidden_size"], num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"], num_kv_heads=hf["num_key_value_heads"], head_dim=hf["head_dim"],
        mlp_dim=hf["intermediate_size"], rope_theta=hf["rope_theta"], norm_eps=hf["rms_norm_eps"], tie_embeddings=True,
        vocab_multiple=1,
    )  # fmt: skip
    return config, llama_params(weights, config), np.load(directory / "goldens.npz")


def llama_params(weights, config):
    """Published Llama names to ours."""
    heads = {"query": ("q", config.num_heads), "key": ("k", config.num_kv_heads), "value": ("v", config.num_kv_heads)}

    def stack(name, convert):
        return jnp.stack([convert(weights[f"model.layers.{i}.{name}.weight"]) for i in range(config.num_layers)])

    layers = {
        ours: stack(f"self_attn.{letter}_proj", lambda w, n=n: w.T.reshape(config.embed_dim, n, config.head_dim))
        for ours, (letter, n) in heads.items()
    }
    layers["out"] = stack("self_attn.o_proj", lambda w: w.T.reshape(config.num_heads, config.head_dim, -1))
    layers |= {name: stack(f"mlp.{name}_proj", lambda w: w.T) for name in ("gate", "up", "down")}
    layers["attention_norm"] = stack("input_layernorm", lambda w: w)
    layers["mlp_norm"] = stack("post_attention_layernorm", lambda w: w)
    params = {
        "embedding": jnp.asarray(weights["model.embed_tokens.weight"]),
        "layers": layers,
        "final_norm": jnp.asarray(weights["model.norm.weight"]),
    }
    if not config.tie_embeddings:
        params["head"] = jnp.asarray(weights["lm_head.weight"].T)
    return params


def test_reference_hidden_states_and_logits(shared_dir):
    """Final hidden states and logits of the published code's tiny model, on attended places."""
    config, params, golden = golden_model(shared_dir)
    tokens, mask = golden["synth/input_ids"].astype(np.int32), golden["synth/attention_mask"].astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = np.asarray(forward(params, config, tokens, positions, mask, dtype=jnp.float32))
    used = mask > 0
    expected = golden["synth/hidden_2"]
    assert np.abs(hidden - expected)[used].max() / np.abs(expected[used]).max() < 1e-5
    logits = hidden[0] @ np.asarray(head_kernel(params, config))
    expected = golden["synth/logits_row0"]
    assert np.abs(logits - expected)[used[0]].max() / np.abs(expected[used[0]]).max() < 1e-5


@pytest.mark.parametrize(
    "preset",
    ["gemma2_2b", "olmo2_1b", "olmo2_7b", "qwen3_1_7b", "r1_distill_qwen_1_5b", "phi1_5", "llama1b", "openelm_1b"],
)
@pytest.mark.parametrize("argument", ["", "smoke"])
def test_presets_are_models_of_their_family(repository, preset, argument):
    spec = importlib.util.spec_from_file_location(preset, repository / "configs" / f"{preset}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = freeze(module.get_config(argument)).model
    assert family_of(model).model_type == (model.family or "llama")
