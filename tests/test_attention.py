# SPDX-License-Identifier: Apache-2.0
"""Every attention back end against a dense float32 reference, outputs and gradients; kernels run interpreted."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.attention import dispatch, splash, triton, xla
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.resolve import attention_backend, resolve
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step
from tests.conftest import REPOSITORY

SEGMENTS = {
    "one": [1000],
    "short": [10, 7, 3, 10, 9, 1, 10, 6],
    "long": [31, 64, 20],
    "across blocks": [128, 60, 40],
}
"""Segment lengths of a row; what they leave is padding. The second row of a batch has them in reverse order."""


def segments_of(pattern, length):
    rows = []
    for sizes in (SEGMENTS[pattern], SEGMENTS[pattern][::-1]):
        row = np.repeat(np.arange(1, len(sizes) + 1), sizes)[:length]
        rows.append(np.pad(row, (0, length - len(row))))
    return np.stack(rows).astype(np.int32)


def allowed_of(segments, window):
    """What may attend to what, bool [R, L, L], place by place."""
    rows, length = segments.shape
    allowed = np.zeros((rows, length, length), bool)
    for query in range(length):
        first = max(0, query + 1 - window) if window else 0
        allowed[:, query, first : query + 1] = segments[:, first : query + 1] == segments[:, query, None]
    return allowed


def dense(query, key, value, segments, window=0, soft_cap=0.0):
    """The reference: every score in float32, keys repeated for their query heads."""
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(array, group, axis=2) for array in (key, value))
    scores = jnp.einsum("rqnh,rsnh->rnqs", query, key, precision="highest") / np.sqrt(query.shape[-1])
    scores = soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores
    shares = jax.nn.softmax(jnp.where(allowed_of(segments, window)[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("rnqs,rsnh->rqnh", shares, value, precision="highest")


def inputs(segments, heads, kv_heads, width, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weight = (
        jax.random.normal(k, (*segments.shape, n, width))
        for k, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    query, key = 2 * query, 2 * key  # scores that a soft cap bends
    return [a.astype(dtype) for a in (query, key, value)], weight * (segments > 0)[..., None, None]


def output_and_gradients(attend, arrays, weight):
    def loss(*arrays):
        mixed = attend(*arrays)
        return (mixed * weight).sum(), mixed

    (_, mixed), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return [mixed, *gradients]


def check(attend, segments, heads, width, window, soft_cap, tolerance):
    """Relative to the largest value of each array; also that padding is finite."""
    arrays, weight = inputs(segments, *heads, width)
    ours = output_and_gradients(attend, arrays, weight)
    expected = output_and_gradients(lambda *a: dense(*a, segments, window, soft_cap), arrays, weight)
    assert all(np.isfinite(np.asarray(array)).all() for array in ours)
    used = (segments > 0)[..., None, None]
    for name, a, b in zip(("output", "dq", "dk", "dv"), ours, expected, strict=True):
        error = np.abs(np.where(used, a - b, 0)).max() / np.abs(np.where(used, b, 0)).max()
        assert error < tolerance, (name, error)


ROWS = (
    ("one", 24, 0, 64, (4, 4)),
    ("one", 150, 0, 64, (4, 1)),
    ("short", 70, 10, 8, (4, 2)),
    ("long", 130, 64, 16, (4, 1)),
    ("long", 130, 0, 32, (4, 4)),
)
MASKS = ((0, 0.0), (13, 0.0), (40, 3.0), (0, 3.0))
CROSSED = [
    pytest.param(*rows, *masks, marks=[] if (row + column) % 2 == 0 else pytest.mark.slow)
    for row, rows in enumerate(ROWS)
    for column, masks in enumerate(MASKS)
]
"""Every kind of rows with two of the masks, and every mask with two or three kinds of rows; the others are slow."""


@pytest.mark.parametrize(("pattern", "length", "longest", "block", "heads", "window", "soft_cap"), CROSSED)
def test_xla_equals_the_dense_reference(monkeypatch, pattern, length, longest, block, heads, window, soft_cap):
    monkeypatch.setattr(xla, "BLOCK", block)
    segments = segments_of(pattern, length)
    attend = functools.partial(
        xla.attend, segments_RxS=jnp.asarray(segments), longest_segment=longest, window=window, soft_cap=soft_cap
    )
    check(attend, segments, heads, 8, window, soft_cap, 1e-5)


@pytest.mark.parametrize("pattern", list(SEGMENTS))
@pytest.mark.parametrize("reach", [1, 7, 9, 256])
def test_blocks_that_no_segment_shares_are_skipped(pattern, reach):
    """Each block of queries begins at the first block of keys that any of its rows needs, no earlier and no later."""
    segments, block = segments_of(pattern, 256), 8
    allowed = allowed_of(segments, reach).any(0).reshape(32, block, 32, block).any((1, 3))
    found = xla.first_blocks(jnp.asarray(segments).reshape(2, 32, block).swapaxes(0, 1), reach)
    np.testing.assert_array_equal(found, allowed.argmax(1))


def test_far_attention_takes_longer_blocks(monkeypatch):
    monkeypatch.setattr(xla, "BLOCK", 8)
    monkeypatch.setattr(xla, "FAR_BLOCK", 32)
    monkeypatch.setattr(xla, "FAR", 16)
    segments = segments_of("long", 130)
    check(functools.partial(xla.attend, segments_RxS=jnp.asarray(segments)), segments, (4, 2), 8, 0, 0.0, 1e-5)


@pytest.mark.parametrize(
    ("pattern", "length", "longest", "heads", "width", "window", "soft_cap"),
    [
        ("one", 128, 0, (2, 2), 64, 0, 0.0),
        ("across blocks", 256, 0, (4, 2), 64, 0, 3.0),
        ("across blocks", 256, 128, (2, 1), 128, 0, 0.0),
        ("short", 256, 10, (4, 1), 64, 0, 3.0),
        ("across blocks", 384, 0, (4, 2), 128, 50, 0.0),
        ("long", 256, 64, (2, 1), 256, 40, 3.0),
    ],
)
def test_splash_equals_the_dense_reference(pattern, length, longest, heads, width, window, soft_cap):
    """Its exponentials and running sums are float32; the tolerance is for their order."""
    segments = segments_of(pattern, length)
    attend = functools.partial(
        splash.attend, segments_RxS=jnp.asarray(segments), longest_segment=longest, window=window, soft_cap=soft_cap,
        interpret=True,
    )  # fmt: skip
    check(attend, segments, heads, width, window, soft_cap, 3e-5)


@pytest.mark.parametrize(
    ("pattern", "length", "heads", "width"),
    [("one", 128, (2, 2), 64), ("across blocks", 256, (4, 2), 64), ("short", 256, (4, 1), 128)],
)
def test_triton_equals_the_dense_reference(pattern, length, heads, width):
    segments = segments_of(pattern, length)
    attend = functools.partial(triton.attend, segments_RxL=jnp.asarray(segments), interpret=True)
    check(attend, segments, heads, width, 0, 0.0, 3e-5)


KERNELS = {
    "xla": xla.attend,
    "splash": functools.partial(splash.attend, interpret=True),
    "triton": functools.partial(triton.attend, interpret=True),
}


@pytest.mark.parametrize(("name", "window"), [("xla", 0), ("xla", 30), ("splash", 0), ("splash", 30), ("triton", 0)])
def test_no_gradient_across_segments_or_from_the_future(name, window):
    """What a query depends on, by gradient, is exactly what it may see: some queries of a row, every key and value."""
    segments = segments_of("long", 128)[:1]
    arrays, _ = inputs(segments, 2, 1, 64)
    options = {"window": window} if window else {}
    probes = np.array([0, 30, 31, 60, 94, 95, 114])

    def states(key, value):
        return KERNELS[name](arrays[0], key, value, jnp.asarray(segments), **options)[0, probes].sum((1, 2))

    for jacobian in jax.jit(jax.jacrev(states, (0, 1)))(*arrays[1:]):
        depends = np.abs(np.asarray(jacobian))[:, 0].sum((2, 3)) > 0
        seen = allowed_of(segments, window)[0, probes]
        alone = seen.sum(1) == 1  # one place takes the whole share whatever its key
        np.testing.assert_array_equal(depends[~alone], seen[~alone])
        assert not depends[~seen].any()


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_branches_have_the_window_and_cap_of_their_trunk(window, soft_cap):
    """A branch equals the same tokens put behind its prefix."""
    arrays, _ = inputs(np.ones((1, 14), np.int32), 4, 2, 8)
    trunk_segments, branch_end = np.ones((1, 12), np.int32), np.array([[7]])
    mixed = dispatch.attend_rows(*arrays, jnp.asarray(trunk_segments), branch_end, window=window, soft_cap=soft_cap)
    order = np.array([*range(8), 12, 13])
    inline = dense(*(array[:, order] for array in arrays), np.ones((1, 10), np.int32), window, soft_cap)
    np.testing.assert_allclose(mixed[:, 12:], inline[:, 8:], atol=2e-6)
    np.testing.assert_allclose(mixed[:, :8], inline[:, :8], atol=2e-6)


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_kernels_run_on_each_devices_rows_and_heads(kernel):
    """Over data, fsdp and tensor, inside a jitted function, forward and backward."""
    segments = np.concatenate([segments_of("across blocks", 128), segments_of("long", 128)])
    arrays, weight = inputs(segments, 4, 2, 64)
    expected = output_and_gradients(lambda *a: dense(*a, segments), arrays, weight)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        ours = output_and_gradients(
            lambda *a: dispatch.on_shards(KERNELS[kernel], *a, jnp.asarray(segments)), arrays, weight
        )
    used = (segments > 0)[..., None, None]
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(np.where(used, a, 0), np.where(used, b, 0), atol=3e-5 * np.abs(b).max())


def config_of(attention="auto", length=512, width=64, dtype="bfloat16"):
    return dataclasses.replace(
        Config(),
        data=DataConfig(row_length=length, rows_per_step=8),
        model=ModelConfig(head_dim=width, vocab_size=512),
        train=TrainConfig(attention=attention, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("platform", "changes", "chosen"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"dtype": "float32"}, "splash"),
        ("tpu", {"width": 96}, "xla"),
        ("tpu", {"length": 500}, "xla"),
        ("tpu", {"attention": "xla"}, "xla"),
        ("gpu", {}, "triton"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("gpu", {"width": 256}, "xla"),
    ],
)
def test_auto_takes_the_kernel_of_the_devices_where_it_can(platform, changes, chosen):
    config = config_of(**changes)
    assert attention_backend(config, platform, config.data.row_length) == chosen
    assert attention_backend(config, platform, 64) == "xla"  # a shorter kind of rows, which no kernel takes


def test_a_named_back_end_that_cannot_is_refused_with_the_fix():
    for changes, words in (
        (
            {"attention": "splash", "width": 96},
            "takes `model.head_dim` of 64, 128 or 256, not 96; use train.attention=xla",
        ),
        (
            {"attention": "splash", "length": 500},
            "takes `data.row_length` in multiples of 128, not 500; set 512, or use",
        ),
        (
            {"attention": "triton", "width": 256},
            "takes `model.head_dim` of 64 or 128, not 256; use train.attention=xla",
        ),
        (
            {"attention": "triton", "dtype": "float32"},
            "computes in bfloat16, not float32; set train.dtype=bfloat16, or",
        ),
    ):
        with pytest.raises(UserError) as caught:
            resolve(config_of(**changes), {})
        assert f"`train.attention`={changes['attention']} {words}" in str(caught.value)
    segments = np.ones((1, 128), np.int32)
    arrays, _ = inputs(segments, 2, 2, 64, jnp.bfloat16)
    for options in ({"window": 8}, {"soft_cap": 5.0}):
        with pytest.raises(
            UserError, match="`train.attention`=triton has no attention windows or soft caps; use train"
        ):
            dispatch.attend(*arrays, segments, "triton", **options)


def test_a_step_on_other_devices_is_refused():
    """Resolving does not know the devices (a run trained on TPUs is evaluated anywhere); building the step does."""
    config = resolve(config_of("splash"), {"data": 8})
    factory = state_factory(config, make_mesh(config.mesh), 1)
    with pytest.raises(UserError, match="`train.attention`=splash runs on tpu devices, not on cpu; use auto or xla"):
        make_train_step(factory, 1)


def test_triton_lowers_for_cuda():
    """As far as a machine without a GPU goes: three kernels in the program, one forward and two backward."""
    query, key = (jax.ShapeDtypeStruct((2, 256, heads, 128), jnp.bfloat16) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(query, key, value, segments):
        return dispatch.attend(query, key, value, segments, "triton").astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key, segments)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("xla.gpu.triton") == 3


STEPS = {
    "llama1b": (["--config=configs/llama1b.py", "--config.data.rows_per_step=8"], 1000),
    "llama8b": (
        ["--config=configs/llama8b.py", "--config.model.num_layers=2", "--config.data.rows_per_step=8",
         "--config.mesh.tensor=2"], 0,
    ),
    "llama8b, short rows": (
        ["--config=configs/llama8b.py", "--config.model.num_layers=2", "--config.data.rows_per_step=4",
         "--config.data.row_length=2048", "--config.mesh.tensor=2"], 0,
    ),
    "rows in parts": (
        ["--config=configs/llama8b.py:smoke", "--config.model.vocab_size=512", "--config.model.embed_dim=256",
         "--config.model.head_dim=64", "--config.data.row_length=512", "--config.mesh.fsdp=2",
         "--config.mesh.context=2", "--config.train.attention=splash"], 0,
    ),
}  # fmt: skip

LONG = ("llama1b", "llama8b")
"""Their rows of 8,192 tokens take the compiler minutes."""

KERNELS_ALONE = (
    ((64, "bfloat16", 512, 0, 0.0), 2),
    ((64, "bfloat16", 512, 200, 0.0), 3),
    ((128, "float32", 2048, 0, 0.0), 3),
    ((256, "float32", 2048, 0, 50.0), 3),
    ((256, "bfloat16", 4096, 1024, 50.0), 3),
)
"""Arguments of `compile_for_tpu.kernel`, and how many kernels the program holds."""


def compiled_for_tpus(*cases):
    """What the programs hold, compiled ahead of time for a v5p 2x2x1 slice by one process."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "tests.compile_for_tpu", *map(json.dumps, cases)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parity
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in STEPS])
def test_a_step_with_splash_compiles_for_tpus(name):
    """`auto` sees the mesh's TPUs on a machine that has none. The kernels: forward, forward again in the backward pass
    (remat), and the gradients of queries and of keys with values."""
    assert compiled_for_tpus(("step", *STEPS[name])) == [{"backend": "splash", "kernels": 4, "all": 4}]


@pytest.mark.parity
def test_splash_compiles_for_tpus():
    found = compiled_for_tpus(*(("kernel", *arguments) for arguments, _ in KERNELS_ALONE))
    assert found == [{"backend": "splash", "kernels": count, "all": count} for _, count in KERNELS_ALONE]
