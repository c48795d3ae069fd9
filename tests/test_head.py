# SPDX-License-Identifier: Apache-2.0
"""The chunked head against the plain one, which makes all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.objectives.head import HeadSettings, cross_entropy
from llm_jepa_jax.parallel.mesh import make_mesh

ROWS, LENGTH, SLOTS, WIDTH, VOCABULARY = 8, 24, 16, 32, 64


def case(seed=0, used=0.7, dtype=jnp.float32):
    """Hidden states, head, and target slots of which a part is used."""
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(LENGTH)[:SLOTS] for _ in range(ROWS)]).astype(np.int32)
    weight = (rng.random((ROWS, SLOTS)) < used).astype(np.float32)
    return (
        jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype),
        jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32),
        jnp.asarray(np.where(weight > 0, index, 0)),
        jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, SLOTS)), jnp.int32),
        jnp.asarray(weight),
    )


def plain(hidden, head, index, targets, weight, settings):
    """The definition, with all logits."""
    logits = jnp.take_along_axis(hidden, index[:, :, None], axis=1).astype(jnp.float32) @ head
    if settings.soft_cap:
        logits = settings.soft_cap * jnp.tanh(logits / settings.soft_cap)
    partition = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weight * (partition - target + settings.z_loss * partition**2))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize(("z_loss", "soft_cap"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 3.0), (1e-2, 3.0)])
def test_loss_and_gradients_equal_those_of_all_logits(chunk, z_loss, soft_cap):
    arrays, settings = case(), HeadSettings(chunk, z_loss, soft_cap)
    ours = jax.jit(jax.value_and_grad(lambda h, w: 0.3 * cross_entropy(h, w, *arrays[2:], settings), (0, 1)))
    theirs = jax.jit(jax.value_and_grad(lambda h, w: 0.3 * plain(h, w, *arrays[2:], settings), (0, 1)))
    (value, grads), (expected, expected_grads) = ours(*arrays[:2]), theirs(*arrays[:2])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cross_entropy(*arrays, settings), plain(*arrays, settings), rtol=1e-6)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}])
def test_devices_change_nothing(mesh):
    arrays, settings = case(), HeadSettings(5, 1e-2, 3.0)
    expected, expected_grads = jax.value_and_grad(lambda h, w: plain(h, w, *arrays[2:], settings), (0, 1))(*arrays[:2])
    with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
        value, grads = jax.jit(jax.value_and_grad(lambda h, w, *rest: cross_entropy(h, w, *rest, settings), (0, 1)))(
            *arrays
        )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, other, rtol=1e-5, atol=1e-6)


def test_no_target_at_all_is_zero_with_zero_gradients():
    hidden, head, index, targets, weight = case(used=0.0)
    settings = HeadSettings(8)
    value, grads = jax.value_and_grad(lambda h, w: cross_entropy(h, w, index, targets, weight, settings), (0, 1))(
        hidden, head
    )
    assert value == 0 and not any(np.any(grad) for grad in grads)


def test_what_no_used_slot_names_gets_no_gradient():
    """Free slots have index 0, and place 0 of a row is not a target here."""
    hidden, head, index, targets, weight = case()
    index = jnp.where(weight > 0, jnp.maximum(index, 1), 0)
    grad = jax.grad(lambda h: cross_entropy(h, head, index, targets, weight, HeadSettings(8)))(hidden)
    named = np.zeros((ROWS, LENGTH), bool)
    for row, (places, weights) in enumerate(zip(np.asarray(index), np.asarray(weight), strict=True)):
        named[row, places[weights > 0]] = True
    assert not np.any(np.asarray(grad)[~named]) and np.all(np.any(np.asarray(grad)[named], axis=-1))


def test_bfloat16_accumulates_in_float32():
    arrays = case(dtype=jnp.bfloat16)
    value = cross_entropy(*arrays, HeadSettings(16))
    wide = plain(
        *(array.astype(jnp.bfloat16).astype(jnp.float32) for array in arrays[:2]), *arrays[2:], HeadSettings(1)
    )
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, wide, rtol=1e-4)


def test_the_largest_array_is_a_chunk_of_logits_and_the_heads_gradient_is_summed_once():
    """On 8 devices: no array of all targets by vocabulary, and no collective of the head's size inside the loop."""
    arrays, settings = case(), HeadSettings(4)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        step = jax.jit(jax.grad(lambda h, w, *rest: cross_entropy(h, w, *rest, settings), (0, 1)))
        text = step.lower(*arrays).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    with_vocabulary = {np.prod(shape) // VOCABULARY for shape in shapes if VOCABULARY in shape}
    assert max(with_vocabulary) == WIDTH  # the head itself; a device has 16 targets, a chunk 4
    bodies = re.findall(r"body=%?([\w.\-]+)", text)
    for body in bodies:
        inside = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.M | re.S)[0]
        assert not re.search(rf"f32\[{WIDTH},{VOCABULARY}\][^=]*(all-reduce|reduce-scatter)\(", inside)


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_bias_is_added_to_logits_and_has_its_gradient(mesh):
    """As one more row of the head, that meets a 1 at the end of every hidden state."""
    arrays, settings = case(), HeadSettings(5, 1e-2, 3.0)
    bias = jax.random.normal(jax.random.key(0), (VOCABULARY,))

    def by_rows(hidden, head, bias):
        wide = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
        return plain(wide, jnp.concatenate([head, bias[None]]), *arrays[2:], settings)

    expected, expected_grads = jax.value_and_grad(by_rows, (0, 1, 2))(*arrays[:2], bias)
    devices = jax.devices() if len(mesh) > 1 else jax.devices()[:1]
    with jax.set_mesh(make_mesh(MeshConfig(**mesh), devices)):
        ours = jax.jit(jax.value_and_grad(lambda h, w, b: cross_entropy(h, w, *arrays[2:], settings, b), (0, 1, 2)))
        value, grads = ours(*arrays[:2], bias)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, other, rtol=1e-5, atol=1e-5)
