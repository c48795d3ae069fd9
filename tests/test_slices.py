# SPDX-License-Identifier: Apache-2.0
"""Copies of the parameters on slices with slow links in between: where devices lie, and what crosses when."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.parallel.mesh import AXES, make_mesh, mesh_shape
from llm_jepa_jax.parallel.sharding import num_row_shards, placed_batch, row_parts
from llm_jepa_jax.plan import hlo, work
from llm_jepa_jax.plan.links import Links
from llm_jepa_jax.plan.topology import parse_topology
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step
from tests.conftest import REPOSITORY, small_config


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What a described TPU says of itself."""

    id: int
    slice_index: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0


def two_slices():
    """Two of 2x2 chips, in an order that mixes them."""
    return [Tpu(4 * number + 2 * y + x, number, (x, y, 0)) for y in (0, 1) for x in (0, 1) for number in (1, 0)]


def test_slices_are_what_the_devices_say_and_the_other_axes_stay_inside():
    laid = make_mesh(MeshConfig(fsdp=2, tensor=2), two_slices())
    assert dict(laid.shape) == {"slice": 2, "data": 1, "fsdp": 2, "context": 1, "tensor": 2}
    assert [{device.slice_index for device in part.flat} for part in laid.devices] == [{0}, {1}]


def test_other_devices_are_cut_in_their_order_where_the_configuration_says_so():
    assert dict(make_mesh(MeshConfig()).shape)["slice"] == 1
    mesh = make_mesh(MeshConfig(slices=2, fsdp=2))
    assert mesh.axis_names == AXES and num_row_shards(mesh) == 8
    assert [device.id for device in mesh.devices[0].flat] == [0, 1, 2, 3]
    assert row_parts(mesh) == tuple(range(8))


@pytest.mark.parametrize(
    ("config", "told", "words"),
    [
        (MeshConfig(slices=3), 2, "`mesh.slices`=3, but the devices are those of 2 slices; leave it out"),
        (MeshConfig(slices=3), 0, "`mesh.slices`=3 does not divide 8 devices; use 1, 2, 4, 8"),
        (MeshConfig(fsdp=8), 2, "`mesh.fsdp`=8 does not divide 4 devices; use 1, 2, 4, or -1 to fill"),
        (MeshConfig(slices=0), 0, "`mesh.slices`=0; use a positive number"),
    ],
)
def test_contradictions_about_slices_say_the_fix(config, told, words):
    with pytest.raises(UserError) as error:
        mesh_shape(config, 8, told)
    assert words in str(error.value)


def crossing(module, num_devices):
    """Of each exchange between the first and the second half of the devices: its kind, bytes, and whether it is in a
    loop."""
    inside = set()

    def visit(name):
        if name not in inside:
            inside.add(name)
            for instruction in module.computations[name].instructions:
                for called in instruction.called.values():
                    visit(called)

    for computation in module.computations.values():
        for instruction in computation.instructions:
            if instruction.opcode == "while":
                visit(instruction.called["body"])
    for name, computation in module.computations.items():
        for instruction in computation.instructions:
            found = work.collective_of(module, instruction, num_devices)
            if found and any(len({device < num_devices // 2 for device in group}) > 1 for group in found.groups):
                yield found.kind, found.num_bytes, name in inside


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_gradients_cross_slices_once_a_step(cache_dir, micro_batches):
    """All of the parameters' bytes, and with micro-batches behind their loop."""
    config = small_config(cache_dir, train={"micro_batches": micro_batches}, data={"rows_per_step": 32})
    mesh = make_mesh(MeshConfig(slices=2, data=1, fsdp=4))
    factory = state_factory(config, mesh, 10)
    batch = placed_batch(mesh, 32, RowShape(256, 64, 4))
    with jax.set_mesh(mesh):
        text = make_train_step(factory, 10).lower(factory.abstract, batch).compile().as_text()
    found = list(crossing(hlo.parse(text), 8))
    assert found and not any(looped for *_, looped in found)
    reduced = sum(size for kind, size, _ in found if kind == "all-reduce")
    stored = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(factory.abstract.params)
    )
    assert stored <= reduced
    if micro_batches > 1:  # XLA's own sums, layer by layer in the backward pass, may gather fsdp's parts too
        assert reduced < 1.05 * stored


MEGASCALE = """HloModule jit_f, is_scheduled=true

ENTRY %main (p0: f32[19,8,128]) -> f32[19,8,128] {
  %p0 = f32[19,8,128]{2,1,0} parameter(0)
  %token = token[] after-all()
  %send.1 = (f32[19,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%p0, %token), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[19,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=4, is_host_transfer=true
  %recv-done.1 = (f32[19,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv.1), channel_id=1, is_host_transfer=true
  ROOT %sum = f32[19,8,128]{2,1,0} get-tuple-element(%recv-done.1), index=0
}
"""  # noqa: E501 -- as the compiler writes it
# The lines of libtpu 0.0.42 for v5p:2x2x1*2, without notes that nobody reads.


def test_what_hosts_send_between_slices_is_counted_once():
    from llm_jepa_jax.plan.schedule import Walk

    module, topology = hlo.parse(MEGASCALE), parse_topology("v5p:2x2x1*2")
    places = [(number, x, y, 0) for number in (0, 1) for x in (0, 1) for y in (0, 1)]
    links = Links(topology, {"slice": 2, "fsdp": 4}, places)
    timeline = Walk(module, topology.chip, links, 8, 0, lambda loop: None).run()
    ((key, traffic),) = timeline.traffic.items()
    assert key == (("slice",), "DCN of 2 slices", "all-reduce")
    assert traffic.count == 1 and traffic.num_bytes == 19 * 8 * 128 * 4
    assert traffic.exposed == pytest.approx(traffic.num_bytes / topology.chip.dcn, abs=3e-6)  # and two hops


@pytest.mark.parametrize(
    ("name", "chips"), [("v5p:4x4x4*2", 128), ("v6e:16x16*4", 1024), ("tpu7x:2x2x1*3", 12), ("v5e:2x4*2", 16)]
)
def test_topologies_of_several_slices(name, chips):
    topology = parse_topology(name)
    assert topology.num_chips == chips
    assert topology.num_devices == chips * topology.chip.per_chip and topology.told == int(name[-1])


@pytest.mark.parametrize("count", ["", "1", "0", "x", "2*2", "100000"])
def test_a_wrong_number_of_slices_is_one_line_with_the_fix(count):
    with pytest.raises(UserError, match=r"is no number of slices; use 2 to .*v5p:4x4x4\*2"):
        parse_topology(f"v5p:4x4x4*{count}")


@pytest.mark.parity
def test_a_step_of_two_slices_compiles_for_tpus(tmp_path):
    """As many gradients over the data-centre network with four micro-batches as there are parameters."""
    pytest.importorskip("libtpu")
    arguments = [
        "--config=configs/llama8b.py:smoke", "--mode=plan", "--topology=v5p:2x2x1*2", "--nosearch",
        f"--workdir={tmp_path}",
        "--config.mesh.fsdp=4", "--config.model.vocab_size=512", "--config.data.rows_per_step=32",
        "--config.train.micro_batches=4",
    ]  # fmt: skip
    command = [sys.executable, "-m", "llm_jepa_jax.main", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["mesh"]["slice"] == 2 and result["chips"] == 8
    between = [each for each in result["exchanges"] if each["links"] == "DCN of 2 slices"]
    assert {tuple(each["axes"]) for each in between} == {("slice",)}
    stored = sum(
        each["bytes_per_device"]
        for each in json.loads((tmp_path / "plan.json").read_text())["shardings"]
        if each["kind"] == "parameter"
    )
    reduced = sum(each["bytes"] for each in between if each["kind"] == "all-reduce")
    assert stored <= reduced < 1.5 * stored  # arrays are padded to whole tiles
