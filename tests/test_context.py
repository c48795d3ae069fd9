# SPDX-License-Identifier: Apache-2.0
"""Rows cut along their length: the same attention, loss and gradient as whole rows, on simulated devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import Config, DataConfig, MeshConfig, freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.attention import dispatch, splash
from llm_jepa_jax.models.transformer import forward, init_params
from llm_jepa_jax.models.weaving import join, split, unweave, weave
from llm_jepa_jax.objectives.parameters import init_parameters
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import rows_sharding
from llm_jepa_jax.resolve import attention_backend, resolve
from llm_jepa_jax.train.step import gradients
from tests.conftest import host_batch, small_config, small_data
from tests.test_attention import dense, inputs, output_and_gradients, segments_of


def in_parts(parts):
    """A mesh that cuts rows into so many parts, and heads into two."""
    return make_mesh(MeshConfig(data=1, context=parts, tensor=2), jax.devices()[: 2 * parts])


@pytest.mark.parametrize(
    ("backend", "pattern", "length", "parts", "longest", "window", "soft_cap"),
    [
        ("xla", "across blocks", 200, 4, 0, 0, 0.0),  # parts of 50, which no block divides
        ("xla", "long", 256, 4, 130, 0, 3.0),  # sees into three parts
        pytest.param("xla", "short", 256, 4, 10, 0, 0.0, marks=pytest.mark.slow),  # into one
        ("xla", "one", 48, 2, 0, 0, 0.0),  # shorter than a block
        ("splash", "across blocks", 256, 2, 0, 0, 3.0),
        pytest.param("splash", "long", 512, 4, 64, 40, 0.0, marks=pytest.mark.slow),
    ],
)
def test_attention_of_parts_is_that_of_whole_rows(backend, pattern, length, parts, longest, window, soft_cap):
    """Output and gradients, against the dense reference."""
    segments = segments_of(pattern, length)
    arrays, weight = inputs(segments, 4, 2, 64 if backend == "splash" else 8)
    expected = output_and_gradients(lambda *a: dense(*a, segments, window, soft_cap), arrays, weight)

    def attend(*arrays):
        if backend == "xla":
            return dispatch.attend(*arrays, jnp.asarray(segments), "xla", longest, window, soft_cap)
        kernel = functools.partial(
            splash.attend, longest_segment=longest, window=window, soft_cap=soft_cap, interpret=True
        )
        reach = min(longest or length, window or length)
        return dispatch.on_shards(kernel, *arrays, jnp.asarray(segments), reach)

    with jax.set_mesh(in_parts(parts)):
        ours = output_and_gradients(attend, arrays, weight)
    used = (segments > 0)[..., None, None]
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(np.where(used, a, 0), np.where(used, b, 0), atol=3e-5 * np.abs(b).max())


def test_no_gradient_leaks_between_parts():
    """From one query of the second part: only to the places of its segment that are not behind it."""
    segments = np.repeat([1, 2, 3], [100, 120, 36]).astype(np.int32)[None]
    arrays, _ = inputs(segments, 4, 2, 8)
    place = 150
    with jax.set_mesh(in_parts(2)):
        pull = jax.jit(
            jax.grad(lambda *a: dispatch.attend(*a, jnp.asarray(segments), "xla")[0, place].sum(), (0, 1, 2))
        )
        by_query, by_key, by_value = pull(*arrays)
    seen = (segments[0] == segments[0, place]) & (np.arange(256) <= place)
    assert seen[:128].any() and not seen[:128].all()  # it looks into the first part, and not at all of it
    for grad in (by_key, by_value):
        np.testing.assert_array_equal(np.abs(np.asarray(grad[0])).sum((1, 2)) > 0, seen)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(np.asarray(by_query[0])).sum((1, 2))), [place])


def test_weaving_is_undone_and_keeps_parts_together():
    rows, length, pairs, size = 2, 8, 3, 1
    tokens = jnp.arange(rows * (length + pairs * size)).reshape(rows, -1)
    ends = jnp.ones((rows, pairs), jnp.int32)
    with jax.set_mesh(in_parts(4)):
        woven, _, more_ends = weave(tokens, tokens, ends, length)
        assert woven.shape == (2, 12) and more_ends.shape == (2, 4)
        assert woven[0].tolist() == [0, 1, 8, 2, 3, 9, 4, 5, 10, 6, 7, 0]
        np.testing.assert_array_equal(unweave(woven, length, tokens.shape[1]), tokens)
        trunk, branches = split(woven, length)
        np.testing.assert_array_equal(trunk, tokens[:, :length])
        np.testing.assert_array_equal(join(trunk, branches), woven)
        odd, same, ends_ = weave(tokens, tokens, ends, 7)  # rows that are not cut
        assert odd is tokens and same is tokens and ends_ is ends


def test_any_length_goes_through_the_model():
    """Prompts come in every length: what parts do not divide lies whole."""
    length = 33
    config = freeze({"model": {"vocab_size": 512, "num_layers": 1, "embed_dim": 32}}).model
    params = init_params(jax.random.key(0), config, jnp.float32)
    tokens = jax.random.randint(jax.random.key(1), (2, length), 0, 512)
    arrays = (tokens, jnp.arange(length)[None].repeat(2, 0), jnp.ones_like(tokens))
    run = functools.partial(jax.jit(forward, static_argnums=1, static_argnames="dtype"), dtype=jnp.float32)
    whole = run(params, config, *arrays)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
        np.testing.assert_allclose(run(params, config, *arrays), whole, atol=1e-5 * np.abs(whole).max())


CASES = {
    "separate": ({}, {"context": 4, "tensor": 2}),
    "shared": (
        {
            "data": {"layout": "shared"},
            "objective": {"jepa": {"num_predictors": 3}},
            "train": {"micro_batches": 2, "remat": "full"},
        },
        {"slices": 2, "fsdp": 2, "context": 2},
    ),
    "windows": (
        {
            "model": {"window": 40, "window_pattern": "LG", "attention_soft_cap": 20.0, "tie_embeddings": False},
            "objective": {"ntp": {"z_loss": 1e-3}, "jepa": {"pooling": "mean", "layer": 1}},
        },
        {"context": 2, "fsdp": 2},
    ),
    "spans": (
        {"objective": {"jepa": {"distance": "infonce"}, "stp": {"weight": 1.0, "draws": 2}, "sigreg": {"weight": 0.1}}},
        {"context": 4},
    ),
}
"""By name: sections of the configuration that differ, and the mesh."""


def loss_and_gradients(config, data):
    """Of the first step of a run."""
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(size for size in vars(config.mesh).values() if size > 0)])
    params = init_parameters(jax.random.key(0), config)
    longest = data.kinds[0].row.longest_segment
    with jax.set_mesh(mesh):
        batch = jax.device_put(host_batch(data), rows_sharding(mesh))
        total, grads, aux, _ = jax.jit(gradients, static_argnums=(2, 3))(params, batch, config, longest)
    return jax.tree.map(np.asarray, (total, aux, grads))


SLOW = ("separate", "spans")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_a_step_of_parts_is_that_of_whole_rows(cache_dir, tokenizer, case):
    """Every term's sum, the embeddings, and the gradient by every parameter."""
    sections, sizes = CASES[case]
    config = small_config(cache_dir, **sections)
    alone = dataclasses.replace(config.train, micro_batches=1, remat="none")
    data = small_data(config, tokenizer)
    whole = loss_and_gradients(dataclasses.replace(config, train=alone, mesh=MeshConfig(data=1)), data)
    cut = loss_and_gradients(dataclasses.replace(config, mesh=MeshConfig(data=1, **sizes)), data)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-5)
    for name, value in whole[1]["sums"].items():
        assert value != 0, name
        np.testing.assert_allclose(cut[1]["sums"][name], value, rtol=1e-5, err_msg=name)
    for path, b in jax.tree.leaves_with_path(whole[2]):
        a = functools.reduce(lambda tree, key: tree[key.key], path, cut[2])
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("values", "sizes", "words"),
    [
        ({}, {"context": 3}, "`mesh.context`=3 does not divide rows of 512 tokens; use a divisor of it"),
        ({"data": {"row_length": 96, "row_buckets": 1}}, {"context": 64}, "does not divide rows of 96 tokens"),
        (
            {"data": {"row_length": 192}},
            {"context": 64},
            "does not divide rows of 96 tokens; use a divisor of it, or data.row_buckets=1",
        ),
        (
            {"data": {"rows_per_step": 64}},
            {"context": 4, "fsdp": 64},
            "`mesh.fsdp`=64 times `mesh.context`=4 does not divide `model.embed_dim`=192",
        ),
        (
            {"train": {"attention": "splash"}, "model": {"head_dim": 64}, "data": {"row_length": 384}},
            {"context": 2},
            "takes `data.row_length` in multiples of 256 over `mesh.context`=2, not 384; set 512, or use",
        ),
        (
            {"train": {"attention": "triton", "dtype": "bfloat16"}, "model": {"head_dim": 64}},
            {"context": 2},
            "`train.attention`=triton takes whole rows, not `mesh.context`=2; use mesh.context=1, or use",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_fix(values, sizes, words):
    with pytest.raises(UserError) as error:
        resolve(freeze({"data": {"row_length": 512}} | values), sizes)
    assert words in str(error.value)


def test_auto_looks_at_the_parts():
    config = dataclasses.replace(Config(), data=DataConfig(row_length=512))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, head_dim=64))
    assert [attention_backend(config, "tpu", 512, parts) for parts in (1, 4, 8)] == ["splash", "splash", "xla"]
    train = dataclasses.replace(config.train, dtype="bfloat16")
    config = dataclasses.replace(config, train=train)
    assert [attention_backend(config, "gpu", 512, parts) for parts in (1, 2)] == ["triton", "xla"]
