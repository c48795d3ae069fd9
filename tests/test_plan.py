# SPDX-License-Identifier: Apache-2.0
"""Planning for chips that are not there: names, memory, programs read back, links, and the command line."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jepa_jax.config import MeshConfig, freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import parse, run
from llm_jepa_jax.models import transformer
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.plan import hlo, work
from llm_jepa_jax.plan.chips import CHIPS
from llm_jepa_jax.plan.compiled import Compiled, bytes_needed, compile_step
from llm_jepa_jax.plan.kernels import visited
from llm_jepa_jax.plan.links import Links, exchange_seconds
from llm_jepa_jax.plan.memory import leaf_bytes, state_bytes
from llm_jepa_jax.plan.mode import PlanFlags, plan
from llm_jepa_jax.plan.search import candidates
from llm_jepa_jax.plan.shapes import Assumptions, step_shape
from llm_jepa_jax.plan.topology import USUAL, compile_devices, parse_topology, plan_mesh, prepare_environment
from llm_jepa_jax.train.state import state_factory
from tests.conftest import REPOSITORY


def preset(*arguments):
    return freeze(parse(["main", *arguments]).config)


def test_chips_are_told_in_one_unit():
    for chip in CHIPS.values():
        if chip.platform != "tpu":
            continue
        units = chip.peak / chip.clock
        assert 1e5 < units < 2e6, chip.name  # FLOPs a cycle: a few matrix units of 128 or 256 squared
        assert chip.peak / chip.hbm_bandwidth > 100, chip.name  # FLOPs a byte
        assert chip.hbm < 97 * 2**30 and 4e10 < chip.link < 1e11 < chip.hbm_bandwidth, chip.name


@pytest.mark.parametrize(
    "name", [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in USUAL.get(chip.torus, ())]
)
def test_every_usual_slice_has_a_name(name):
    topology = parse_topology(name)
    assert topology.num_devices == topology.num_chips * topology.chip.per_chip


@pytest.mark.parametrize(
    ("name", "chips", "wraps"),
    [("v5p:4x4x4", 64, (True,) * 3), ("v5p:2x2x4", 16, (False,) * 3), ("v6e:16x16", 256, (True,) * 2),
     ("v5e:8x16", 128, (False, True)), ("tpu7x:4x4x8", 128, (True,) * 3)],
)  # fmt: skip
def test_rings_close_where_the_torus_does(name, chips, wraps):
    topology = parse_topology(name)
    assert topology.num_chips == chips
    assert tuple(topology.wraps(dimension) for dimension in range(len(wraps))) == wraps


@pytest.mark.parametrize(
    ("name", "word"),
    [("v9:4x4", "no such topology"), ("v5p-128", "named by its shape"), ("v5p:4x4", "3 dimensions"),
     ("v6e:4x4x4", "2 dimensions"), ("v5p:3x4x4", "even"), ("v6e:32x16", "largest"), ("v6e:big", "is no shape"),
     ("cpu:0", "cpu:8"), ("cpu:x", "cpu:8"), ("gpu:h900x8", "h100"), ("gpu:h100x12", "multiple of 8"),
     ("", "no topology")],
)  # fmt: skip
def test_a_wrong_topology_is_one_line_with_the_fix(name, word, tmp_path):
    with pytest.raises(UserError, match=word) as error:
        plan(parse(["main", "--config=configs/llama8b.py:smoke"]).config, tmp_path, PlanFlags(name))
    assert "\n" not in str(error.value) and "--topology" in str(error.value)


def test_memory_of_the_state_is_the_sum_of_its_leaves():
    """On a mesh of eight, by fields; each leaf counts what one device holds of it."""
    config = preset("--config=configs/llama8b.py:smoke", "--config.model.vocab_size=512")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    state = state_factory(config, mesh, 10).abstract
    found = state_bytes(state)
    local = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
    assert sum(found.values()) == sum(local)
    assert found["parameters"] == sum(map(leaf_bytes, jax.tree.leaves(state.params)))
    assert found["frozen"] == 0 and 2 * found["parameters"] <= found["optimizer"] < 2.01 * found["parameters"]


@pytest.fixture(scope="module")
def looped():
    """A loop of 5 products over a mesh of 2 x 4, its weights cut over four devices."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def loss(weights, x):
        def layer(x, weight):
            x = jnp.tanh(x @ weight)
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))), None

        return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()

    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((128, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    return hlo.parse(jax.jit(loss).lower(weights, x).compile().as_text())


def test_a_loop_counts_as_often_as_it_runs(looped):
    entry = looped.computations[looped.entry]
    loops = [each for each in entry.instructions if each.opcode == "while"]
    assert [looped.trips(loop) for loop in loops] == [5]
    body = looped.computations[loops[0].called["body"]]
    products = sum(work.product_flops(looped, body, each) for each in body.instructions)
    assert products == 2 * (128 / 8) * 64 * 64


def test_a_gather_has_its_bytes_and_its_groups(looped):
    found = [
        work.collective_of(looped, each, 8)
        for computation in looped.computations.values()
        for each in computation.instructions
        if each.opcode.startswith("all-gather")
    ]
    gathers = [each for each in found if each and each.num_bytes == 64 * 64 * 4]
    assert gathers and set(gathers[0].groups) == {(0, 1, 2, 3), (4, 5, 6, 7)}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, x", ((0, 1), (2, 3))),
        ("nothing", ((0, 1, 2, 3),)),
    ],
)
def test_replica_groups_in_every_form(text, groups):
    assert {tuple(sorted(group)) for group in work.replica_groups(text, 4)} == set(groups)


def test_exchanges_take_their_bytes_over_the_links_of_their_axis():
    topology = parse_topology("v5p:4x4x4")
    places = [(0, x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    links = Links(topology, {"data": 4, "fsdp": 16}, places)
    data, fsdp = links.route(tuple(range(0, 64, 16))), links.route(tuple(range(16)))
    assert (data.axes, data.name) == (("data",), "ICI ring of 4")
    assert (fsdp.axes, fsdp.name) == (("fsdp",), "ICI ring of 4 x ring of 4")
    assert fsdp.bandwidth == 2 * data.bandwidth == 4 * topology.chip.link
    gigabyte = exchange_seconds(fsdp, "all-gather", 1e9)
    assert gigabyte == pytest.approx(1e9 * 15 / 16 / fsdp.bandwidth, rel=1e-2)
    assert exchange_seconds(fsdp, "all-reduce", 1e9) == pytest.approx(2 * gigabyte, rel=1e-2)


def test_slices_exchange_over_the_data_centre():
    topology = parse_topology("v6e:2x2")
    places = [(s, x, y) for s in range(2) for x in range(2) for y in range(2)]
    route = Links(topology, {"slices": 2, "fsdp": 4}, places).route((0, 4))
    assert route.slices == 2 and "DCN" in route.name
    assert exchange_seconds(route, "all-reduce", 1e9) == pytest.approx(1e9 / topology.chip.dcn, rel=1e-2)


@pytest.mark.parametrize(("length", "reach", "block"), [(1024, 1024, 128), (1024, 200, 128), (512, 512, 512)])
def test_visited_blocks_are_those_that_the_mask_touches(length, reach, block):
    back = np.arange(length)[:, None] - np.arange(length)
    mask = (back >= 0) & (back < reach)
    touched = mask.reshape(length // block, block, length // block, block).any(axis=(1, 3))
    assert visited(length, reach, block) == touched.sum() * block**2


def test_a_step_of_assumed_data():
    config = preset("--config=configs/llama8b.py", "--config.data.layout=shared")
    shape = step_shape(config, Assumptions(examples_per_row=8))
    assert (shape.length, shape.target_slots, shape.longest_segment) == (8192, 8192, 2048)
    assert step_shape(config, Assumptions(examples_per_row=1.5)).longest_segment == 8192
    assert shape.pair_slots == math.ceil(8 * 0.25 * 1.25) and shape.branch == 1
    alone = step_shape(preset("--config=configs/llama8b.py", "--config.objective.jepa.weight=0"), Assumptions())
    assert alone.pair_slots == alone.branch == 0
    with pytest.raises(UserError, match="longest_segment=9000"):
        step_shape(config, Assumptions(longest_segment=9000))


def test_the_search_prefers_what_fits_and_is_fast():
    """By arithmetic, for GPUs: nothing is compiled."""
    config, topology = preset("--config=configs/llama8b.py"), parse_topology("gpu:h100x64")
    found = candidates(config, step_shape(config, Assumptions()), topology, ())
    fitting = [each for each in found if each.fits]
    assert found[0] is fitting[0] and 0 < len(fitting) < len(found)
    assert all(a.timeline.seconds <= b.timeline.seconds for a, b in zip(fitting, fitting[1:], strict=False))
    whole = [each for each in found if each.mesh.shape["fsdp"] * each.mesh.shape["tensor"] == 1]
    assert not any(each.fits for each in whole)  # 8 billion parameters with AdamW take 96 GB on one device


def test_rows_that_do_not_fit_whole_are_cut():
    long = ("--config.data.row_length=262144", "--config.data.rows_per_step=64", "--config.model.max_positions=262144")
    config, topology = preset("--config=configs/llama8b.py", *long), parse_topology("gpu:h100x64")
    found = candidates(config, step_shape(config, Assumptions()), topology, ())
    assert found[0].fits and found[0].mesh.shape["context"] > 1
    assert found[0].changes(config)["mesh.context"] == found[0].mesh.shape["context"]
    assert not any(each.fits for each in found if each.mesh.shape["context"] == 1)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 120.50G of 95.74G hbm. Exceeded by 24.76G.", 120.5),
        ("RESOURCE_EXHAUSTED: total memory for HLO temporaries (768.00G) exceeds available HBM (30.75G).", 768.0),
        ("RESOURCE_EXHAUSTED: something else", 0.0),
    ],
)
def test_the_compiler_says_by_how_much_a_program_is_too_large(message, gib):
    assert bytes_needed(message) == gib * 2**30


def test_a_plan_for_gpus_has_a_price_and_what_does_not_fit_has_advice(tmp_path):
    values = parse(["main", "--config=configs/llama1b.py", "--config.data.rows_per_step=16"]).config
    fits = plan(values, tmp_path, PlanFlags("gpu:h100x8", chip_hour_price=2.0, assumed=Assumptions(epoch_tokens=1e8)))
    assert fits["fits"] and fits["how"] == "arithmetic" and 0.2 < fits["estimated_mfu"] < 0.8
    assert fits["cost_per_epoch"] == pytest.approx(2 * fits["chip_hours_per_epoch"], abs=0.02)
    assert "--config.mesh.fsdp=" in fits["override"]
    large = parse(["main", "--config=configs/llama8b.py", "--config.data.rows_per_step=16"]).config
    small = plan(large, tmp_path, PlanFlags("gpu:a100x1"))
    assert not small["fits"] and small["estimated_mfu"] is None
    assert "GiB too much" in small["advice"] and "more chips" in small["advice"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The command's own output: a process of its own, whose eight devices are simulated."""
    workdir = tmp_path_factory.mktemp("plan")
    command = [
        sys.executable, "-m", "llm_jepa_jax.main", "--mode=plan", "--config=configs/llama8b.py:smoke",
        "--topology=cpu:8", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", f"--workdir={workdir}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), workdir


def test_a_plan_for_cpus_through_the_command_line(planned):
    result, workdir = planned
    assert (
        result["fits"]
        and result["mesh"] == {"slice": 1, "data": 1, "fsdp": 4, "context": 1, "tensor": 2}
        and result["override"] == ""
    )
    assert result["estimated_step_s"] is None  # nobody knows this CPU's peak
    assert {tuple(each["axes"]) for each in result["exchanges"]} >= {("fsdp",), ("tensor",)}
    assert sum(result["hbm_by_kind_gib"].values()) == pytest.approx(result["hbm_gib"], abs=0.01)
    saved = json.loads((workdir / "plan.json").read_text())
    assert saved["topology"] == "cpu:8" and (workdir / "plan.png").stat().st_size > 10_000


def test_a_compiled_step_agrees_with_arithmetic_on_flops():
    """Products of a whole step on one device, against 6 FLOPs a weight and token: nothing is lost in reading it."""
    config = preset(
        "--config=configs/tiny.py", "--config.data.row_length=256", "--config.data.rows_per_step=4",
        "--config.objective.jepa.weight=0", "--config.model.vocab_size=512", "--config.train.attention=xla",
        "--config.train.micro_batches=1", "--config.train.remat=dots", "--config.model.num_layers=3",
    )  # fmt: skip
    topology, shape = parse_topology("cpu:1"), step_shape(config, Assumptions())
    mesh = plan_mesh(config.mesh, topology, jax.devices()[:1])
    compiled = compile_step(config, shape, mesh, topology)
    assert isinstance(compiled, Compiled)
    model, tokens = config.model, 4 * 256
    attention = model.embed_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    weights = 3 * (attention + 3 * model.embed_dim * model.mlp_dim)
    expected = 6.0 * tokens * (weights + model.embed_dim * model.vocab_size / 2)
    assert expected < compiled.timeline.product_flops < 1.25 * expected  # and the blocks of attention


def test_planning_without_the_compiler_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llm_jepa_jax\[plan\]'"):
        run(
            [
                "main",
                "--mode=plan",
                "--config=configs/llama8b.py:smoke",
                "--topology=v5p:2x2x1",
                f"--workdir={tmp_path}",
            ]
        )


def shallow(layers, remat):
    """A step of a model with so many layers, compiled for four v5p chips."""
    config = preset(
        "--config=configs/llama1b.py", "--config.data.row_length=1024", "--config.data.rows_per_step=16",
        "--config.model.vocab_size=4096", "--config.model.num_heads=16", "--config.model.num_kv_heads=4",
        "--config.model.head_dim=128", f"--config.model.num_layers={layers}", f"--config.train.remat={remat}",
        "--config.objective.head_chunk=2048",
    )  # fmt: skip
    topology = parse_topology("v5p:2x2x1")
    prepare_environment(topology)
    mesh = plan_mesh(config.mesh, topology, compile_devices(topology))
    return compile_step(config, step_shape(config, Assumptions()), mesh, topology)


@pytest.mark.parity
def test_unrolled_layers_extrapolate_to_the_loop(monkeypatch):
    """Two and four layers compiled one after the other say what twelve in a loop take, within 5%; FLOPs exactly."""
    pytest.importorskip("libtpu")
    loop = shallow(12, "full")
    remat = nn.remat  # one after the other, only a barrier keeps the compiler from undoing the recomputation
    monkeypatch.setattr(nn, "remat", lambda block, **options: remat(block, **options | {"prevent_cse": True}))
    monkeypatch.setattr(transformer.Decoder, "_unrolled", property(lambda self: True))
    two, four = (shallow(layers, "full") for layers in (2, 4))
    assert not loop.timeline.unknown_loops and not loop.timeline.unpriced

    def extrapolated(of):
        return of(two.timeline) + 5 * (of(four.timeline) - of(two.timeline))

    assert extrapolated(lambda t: t.product_flops) == pytest.approx(loop.timeline.product_flops, rel=1e-3)
    assert extrapolated(lambda t: t.kernels) == pytest.approx(loop.timeline.kernels, rel=1e-3)
    assert extrapolated(lambda t: t.seconds) == pytest.approx(loop.timeline.seconds, rel=0.05)


@pytest.mark.parity
def test_remat_dots_does_not_run_the_attention_kernel_forward_again():
    """In products over the places that forward blocks (512) cover: 2 forward, and 7 backward over 12/7 as many places,
    for those blocks are of 1,024. So a layer takes 2 + 12, and with `full` 2 more."""
    pytest.importorskip("libtpu")
    dots, full = shallow(2, "dots"), shallow(2, "full")
    assert dots.timeline.kernel_flops / full.timeline.kernel_flops == pytest.approx(14 / 16)
    assert dots.memory.activations > full.memory.activations
