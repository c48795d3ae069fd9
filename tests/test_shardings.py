# SPDX-License-Identifier: Apache-2.0
"""The sharding report, held to what is recorded, and vocabularies over `tensor`."""

import json

import pytest
from jax.sharding import AbstractMesh

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.main import parse
from llm_jepa_jax.parallel.mesh import AXES, AXIS_TYPES
from llm_jepa_jax.plan.memory import state_bytes
from llm_jepa_jax.plan.mode import PlanFlags, plan
from llm_jepa_jax.plan.shardings import shardings, warnings
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.vocabulary import padded, padding_line
from tests import record_specs
from tests.conftest import small_config


@pytest.mark.parametrize("name", record_specs.CASES)
def test_the_state_lies_where_it_is_recorded_to_lie(name):
    """If the change is meant: `python -m tests.record_specs`, and look at what git shows."""
    assert record_specs.lines(name) == (record_specs.DIRECTORY / f"{name}.txt").read_text().splitlines()


def test_nothing_else_is_recorded():
    assert {path.stem for path in record_specs.DIRECTORY.iterdir()} == set(record_specs.CASES)


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=AXIS_TYPES)


@pytest.mark.parametrize("lora", [{}, {"rank": 4}, {"rank": 4, "base_dtype": "nf4", "tile_size": 8}])
@pytest.mark.parametrize("moment", ["full", "factored"])
def test_every_array_of_the_state_is_in_the_report_once(cache_dir, lora, moment):
    """Their bytes are those of the plan, by kind, whatever is trained and however."""
    config = small_config(cache_dir, lora=lora, opt={"second_moment": moment})
    mesh = mesh_of(slice=2, data=2, fsdp=2, tensor=2)
    found = shardings(config, mesh)
    kinds = state_bytes(state_factory(config, mesh, 1).abstract)
    assert len({(each.kind, each.name) for each in found}) == len(found)
    assert sum(each.bytes_per_device for each in found if each.kind == "parameter") == kinds["parameters"]
    assert sum(each.bytes_per_device for each in found if each.kind == "frozen") == kinds["frozen"]
    assert sum(each.bytes_per_device for each in found) == sum(kinds.values())
    for each in found:
        assert len(each.spec) == len(each.shape) and each.copies >= 4  # two slices, two of data
        assert not each.axes or len(each.axes) == len(each.shape)
    matrices = [each for each in found if each.name == "layers/gate" and each.kind in ("parameter", "frozen")]
    assert all(
        each.spec == (None, "context+fsdp", "tensor") and each.copies == 4 for each in matrices if len(each.shape) == 3
    )


def test_large_arrays_that_lie_whole_are_told(cache_dir):
    config = small_config(cache_dir, model={"embed_dim": 1024, "mlp_dim": 4096})
    (line,) = warnings(shardings(config, mesh_of(data=8)), mesh_of(data=8))
    assert "9 large arrays lie whole on 8 devices each" in line and "parameter layers/gate" in line
    cut = mesh_of(data=2, fsdp=2, tensor=2)
    assert warnings(shardings(config, cut), cut) == []
    assert warnings(shardings(config, mesh_of()), mesh_of()) == []  # one device has to hold it


@pytest.mark.parametrize("vocab_size", [128_256, 256_000])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16, 128])
def test_large_vocabularies_are_cut_over_tensor_without_padding(vocab_size, tensor):
    model = ModelConfig(vocab_size=vocab_size)
    assert padded(model, tensor) == model and model.padded_vocab_size == vocab_size
    assert vocab_size % tensor == 0 and padding_line(model) == ""


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "rows", "multiple"),
    [(256_000, 3, 256_128, 384), (151_669, 1, 151_680, 128), (50_257, 8, 50_304, 128)],
)
def test_padding_is_told_where_there_is_some(vocab_size, tensor, rows, multiple):
    model = padded(ModelConfig(vocab_size=vocab_size), tensor)
    assert model.padded_vocab_size == rows and rows % tensor == 0
    line = padding_line(model)
    assert f"{vocab_size:,} ids in {rows:,} rows, a multiple of {multiple}" in line
    assert f"the {rows - vocab_size:,} behind them are zeros" in line


def test_a_plan_writes_the_report_and_shows_it_where_asked(tmp_path, capsys):
    config = ["--config=configs/llama8b.py:smoke", "--config.model.vocab_size=500", "--config.mesh.tensor=2"]
    values = parse(["main", *config]).config
    result = plan(values, tmp_path, PlanFlags("gpu:h100x8", search=False, verbose=True))
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("Arrays of the state", "slice+data+fsdp", "500 ids in 512 rows"):
        assert words in shown
    written = json.loads((tmp_path / "plan.json").read_text())
    assert {each["name"] for each in written["shardings"]} >= {"embedding", "layers/query", "step"}
    assert "shardings" not in result and written["warnings"] == []
    plan(values, tmp_path, PlanFlags("gpu:h100x8", search=False))
    assert "Arrays of the state" not in capsys.readouterr().out
