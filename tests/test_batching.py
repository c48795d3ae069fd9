# SPDX-License-Identifier: Apache-2.0
"""How many sequences a batch has: what is reckoned is what compiled programs hold, and what does not fit is halved."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.config import MeshConfig, ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.batching import MOST_CPU_ROWS, fitting_rows, free_bytes, in_batches, weight_bytes
from llm_jepa_jax.eval.generate import Generator, Vocabulary
from llm_jepa_jax.models.transformer import abstract_params
from llm_jepa_jax.parallel.mesh import make_mesh
from tests.conftest import SMALL_MODEL

TOO_LARGE = 2**56
"""Bytes that no machine has."""


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "float32"),
        ({"vocab_size": 65536}, "bfloat16"),
        pytest.param({"num_layers": 9, "num_kv_heads": 4}, "float32", marks=pytest.mark.slow),
    ],
)
def test_reckoned_bytes_cover_what_a_compiled_program_holds(changes, dtype):
    """Its temporary memory with 8 and with 24 rows: never more than reckoned, and not a fraction of it."""
    model, mesh = ModelConfig(**SMALL_MODEL | changes), make_mesh(MeshConfig(), jax.devices()[:1])
    generator = Generator(model, Vocabulary(model.vocab_size, ()), mesh, 32, 0, jnp.dtype(dtype))
    params, width = abstract_params(model, jnp.float32)[0], 128

    def held(rows):
        shapes = ((rows, width), jnp.int32), ((rows,), jnp.int32), ((rows,), jnp.bool_), ((rows, 2), jnp.uint32)
        arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        with jax.set_mesh(mesh):
            compiled = generator._compiled.lower(params, None, *arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = held(8), held(24)
    row_bytes, beside = generator._row_bytes(width, 0), weight_bytes(params, mesh, jnp.dtype(dtype))
    assert 0.9 * (many - few) < 16 * row_bytes
    assert many < 24 * row_bytes + beside < 5 * many


@pytest.mark.parametrize(
    ("row_bytes", "free", "wanted", "shards", "rows"),
    [
        (10, 300, 500, 1, 16), (10, 300, 500, 4, 64), (10, 1000, 5, 1, 8), (10, 1000, 5, 4, 8), (10, 9, 5, 1, 1),
        (10, -5, 5, 8, 8), (1, 10**9, 10**6, 2, 2 * MOST_CPU_ROWS), (1, 10**9, 1, 1, 1), (10, 39, 99, 1, 2),
    ],
)  # fmt: skip
def test_rows_are_powers_of_two_that_fit(row_bytes, free, wanted, shards, rows):
    assert fitting_rows(row_bytes, free, wanted, make_mesh(MeshConfig(), jax.devices()[:shards])) == rows


def test_simulated_devices_share_the_memory_of_the_machine():
    one, eight = (free_bytes(make_mesh(MeshConfig(), jax.devices()[:n])) for n in (1, 8))
    assert 2**20 < eight < one / 4


def run_below(most, done):
    """A batch that asks its device for memory that it does not have where it has more rows than that."""

    def run(chosen, rows):
        assert len(chosen) <= rows
        if rows > most:
            jnp.zeros((rows, TOO_LARGE // rows), jnp.int8).block_until_ready()
        done.append(list(chosen))

    return run


def test_what_does_not_fit_is_halved_and_said(caplog):
    """Everything is run once, none of it more often; the refusal is the device's own."""
    done, told = [], []
    in_batches(range(20), lambda last, left: 16, run_below(5, done), 2, told.append)
    assert sorted(i for batch in done for i in batch) == list(range(20)) and {len(batch) for batch in done} == {4}
    assert told == [4, 8, 12, 16, 20]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "16 sequences together do not fit the devices' memory; 8 at a time from here on" in caplog.text
    with pytest.raises(UserError, match="^2 sequences together do not fit the devices' memory; set a smaller"):
        in_batches(range(20), lambda last, left: 16, run_below(1, []), 2, told.append)


def test_other_errors_of_a_device_are_not_taken_for_want_of_memory():
    def run(chosen, rows):
        np.asarray(jax.jit(lambda x: jax.pure_callback(fail, x, x))(jnp.zeros(3)))

    def fail(x):
        raise ValueError("another reason")

    with pytest.raises(jax.errors.JaxRuntimeError, match="another reason"):
        in_batches(range(4), lambda last, left: 4, run, 1, lambda done: None)
