# SPDX-License-Identifier: Apache-2.0
"""XLA's options by kind of device: each is one that the compiler knows, and the step is compiled with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.config import freeze
from llm_jepa_jax.main import parse
from llm_jepa_jax.parallel import compiler_options as table
from llm_jepa_jax.parallel.compiler_options import compiler_options
from llm_jepa_jax.parallel.mesh import AXES
from llm_jepa_jax.parallel.sharding import placed_batch
from llm_jepa_jax.plan.chips import CHIPS
from llm_jepa_jax.plan.topology import USUAL, compile_devices, parse_topology, prepare_environment
from llm_jepa_jax.train import step
from llm_jepa_jax.train.state import state_factory

TPUS = [chip.name for chip in CHIPS.values() if chip.platform == "tpu"]


def smoke(*arguments):
    return freeze(
        parse(["main", "--config=configs/llama8b.py:smoke", "--config.model.vocab_size=512", *arguments]).config
    )


def mesh_of(devices):
    return Mesh(
        np.asarray(devices).reshape([-1 if axis == "fsdp" else 1 for axis in AXES]),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def smallest_slice(name):
    topology = parse_topology(f"{name}:{USUAL[CHIPS[name].torus][0]}")
    prepare_environment(topology)
    return mesh_of(compile_devices(topology))


def compiled_with(mesh, options):
    """A small loop of products over sharded weights."""
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    weights = jax.ShapeDtypeStruct((3, 256, 256), jnp.bfloat16, sharding=cut)
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    run = jax.jit(lambda weights, x: jax.lax.scan(lambda x, weight: (x @ weight, None), x, weights)[0])
    return run.lower(weights, x).compile(compiler_options=options)


@pytest.mark.parity
@pytest.mark.parametrize("name", TPUS)
def test_the_compiler_takes_every_option_of_a_tpu(name):
    pytest.importorskip("libtpu")
    mesh = smallest_slice(name)
    options = compiler_options(smoke(), mesh)
    assert options and options == table.TPU[mesh.devices.flat[0].device_kind]
    assert compiled_with(mesh, options).as_text()
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compiled_with(mesh, options | {"xla_tpu_no_such_thing": True})


@pytest.mark.parametrize("name", table.GPU)
def test_xla_knows_every_option_of_a_gpu(name):
    """Options of all platforms are one message in XLA, so a CPU's compiler refuses a name that there is not."""
    double = jax.jit(lambda x: 2 * x, compiler_options={name: table.GPU[name]})
    assert double(1.0) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: 2 * x, compiler_options={f"{name}_not": True})(1.0)


def test_a_cpu_has_no_options_and_nobody_has_them_when_told_so():
    mesh = mesh_of(jax.devices())
    assert compiler_options(smoke(), mesh) == {}

    class Device:
        platform, device_kind = "tpu", "TPU v6 lite"

    tpu = type("Mesh", (), {"devices": np.asarray([Device()])})
    assert compiler_options(smoke(), tpu) == table.TPU["TPU v6 lite"]
    assert compiler_options(smoke("--config.train.compiler_options=none"), tpu) == {}


def test_the_step_is_compiled_with_them(monkeypatch):
    """An option that there is not, put into the table, stops the compilation of the step."""
    config, mesh = smoke(), mesh_of(jax.devices())
    monkeypatch.setattr(step, "compiler_options", lambda *_: {"xla_no_such_thing": True})
    factory = state_factory(config, mesh, 4)
    batch = placed_batch(mesh, config.data.rows_per_step, RowShape(256, 256, 4))
    with jax.set_mesh(mesh), pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_thing"):
        step.make_train_step(factory, 4).lower(factory.abstract, batch).compile()
