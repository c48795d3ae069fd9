# SPDX-License-Identifier: Apache-2.0
"""What the optimizer keeps, where it lies, and that it trains."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm_jepa_jax.batch import FIELDS
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import global_batch
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step
from tests.conftest import host_batch, small_config, small_data

LEAN = {"first_moment_dtype": "bfloat16", "second_moment": "factored"}


def losses(config, tokenizer, devices, steps=12):
    """Total loss of some steps on one batch."""
    data, mesh = small_data(config, tokenizer), make_mesh(config.mesh, jax.devices()[:devices])
    factory = state_factory(config, mesh, 100)
    state, out = factory.create(), []
    batch = host_batch(data)
    with jax.set_mesh(mesh):
        batch = global_batch(mesh, {name: getattr(batch, name) for name in FIELDS})
        step = make_train_step(factory, 100, data.kinds[0].row.longest_segment)
        for _ in range(steps):
            state, metrics = step(state, batch)
            out.append(float(metrics["last"]["total_loss"]))
    return out


@pytest.mark.parametrize(
    "options",
    [LEAN, *(pytest.param(each, marks=pytest.mark.slow) for each in ({}, {"first_moment_dtype": "bfloat16"}))],
)
def test_every_choice_trains_the_same_on_8_devices(tmp_path, tokenizer, options):
    config = small_config(tmp_path, opt={"learning_rate": 3e-3, **options})
    alone = losses(config, tokenizer, 1)
    assert alone[-1] < 0.8 * alone[0]
    mesh = small_config(tmp_path, opt={"learning_rate": 3e-3, **options}, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(losses(mesh, tokenizer, 8)[:4], alone[:4], rtol=1e-4)


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_what_each_choice_keeps(tmp_path):
    """Bytes of the state against 4 a parameter, and the factors' places on a mesh."""
    kept = {}
    for name, options in (("full", {}), ("first", {"first_moment_dtype": "bfloat16"}), ("lean", LEAN)):
        config = small_config(tmp_path, opt=options, mesh={"data": 1, "fsdp": 4, "tensor": 2})
        state = state_factory(config, make_mesh(config.mesh), 100).abstract
        kept[name] = bytes_of(state.opt_state) / bytes_of(state.params)
    assert kept["full"] == pytest.approx(2, abs=0.01) and kept["first"] == pytest.approx(1.5, abs=0.01)
    assert 0.5 < kept["lean"] < 0.75
    gates = {
        leaf.shape: leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        if "gate" in jax.tree_util.keystr(path)
    }
    stored = ("context", "fsdp")
    assert gates == {(2, 32, 64): PartitionSpec(None, stored, "tensor"), (2, 32): PartitionSpec(None, stored),
                     (2, 64): PartitionSpec(None, "tensor"), (1,): PartitionSpec()}  # fmt: skip
