# SPDX-License-Identifier: Apache-2.0
"""`--mode=verify`: what is equal is found equal, and what is not is found where it departs."""

import dataclasses
import gc
import json
import sys
import weakref

import jax
import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.analysis import compare
from llm_jepa_jax.checkpoint.hf_export import ExportSettings, export
from llm_jepa_jax.checkpoint.safetensors import read_header
from llm_jepa_jax.config import MeshConfig, RopeScalingConfig, to_dict
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import main, run
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.run_directory import open_published
from tests.conftest import small_config
from tests.test_hf_files import MODEL, write
from tests.test_initial import QUICK

DEEP = dataclasses.replace(MODEL, num_layers=3, tie_embeddings=False, max_positions=128)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A published directory of three layers in one file, and the same in bfloat16."""
    directory = tmp_path_factory.mktemp("deep")
    write(directory / "model", DEEP, shard_bytes=10**9)
    lj.load(directory / "model").save_hf(directory / "half", dtype="bfloat16")
    return directory


def verify(first, second, *flags):
    return run(["main", "--mode=verify", f"--workdir={first}", f"--against={second}", *flags])


def copied(source, target, tensor=None, change=lambda array: array * 1.5):
    """A copy of a directory in which one tensor is another."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if tensor:
        stored = read_header(target / "model.safetensors")[tensor]
        mapped = np.memmap(stored.path, stored.dtype, "r+", stored.start, stored.shape)
        mapped[...] = change(np.array(mapped))
        mapped.flush()
    return target


def test_a_run_and_its_export_are_one_model(tmp_path, monkeypatch, capsys):
    """A trained run on its own mesh; exported, rounded to bfloat16; from the command line, with its exit code."""
    workdir = tmp_path / "run"
    run([*QUICK, f"--workdir={workdir}"])
    lm = lj.load(workdir)
    lm.save_hf(tmp_path / "whole")
    lm.save_hf(tmp_path / "half", dtype="bfloat16")
    assert verify(workdir, tmp_path / "whole")["verdict"] == "equal to the last bit"
    shown = capsys.readouterr().out
    arguments = ["main", "--mode=verify", f"--workdir={tmp_path}/half", f"--against={workdir}", f"--out={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["verdict"] == "equal up to the rounding of bfloat16 weights" and result["equal"]
    assert 1e-4 < result["hidden_relative_rms"] < 0.05 and 0 < result["kl_mean"] <= result["kl_max"] < 0.01
    assert "both rounded" in out and "both rounded" not in shown and "layer 1" in shown
    numbers = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert [layer["name"] for layer in numbers["as they are"]["layers"]][-2:] == ["final norm", "logits"]
    assert set(numbers["both rounded"]["inputs"]) == {"random", "packed", "long"}
    assert (tmp_path / "out" / "verify.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bfloat16", "int8"])
def test_adapters_are_compared_merged(deep, tokenizer, tmp_path, base, capsys):
    """With frozen weights in bfloat16 the export's rounding is of the sum; codes are what an export does not have."""
    sizes = (
        f"--config.model.{name}={getattr(DEEP, name)}" for name in ("embed_dim", "head_dim", "mlp_dim", "num_layers")
    )
    tokenizer.save_model(tmp_path / "t.model")
    tile = ["--config.lora.tile_size=8"] if base == "int8" else []
    run([
        *QUICK, *sizes, *tile, f"--config.init.checkpoint={deep}/model", f"--config.text.tokenizer={tmp_path}/t.model",
        "--config.model.max_positions=128", "--config.model.tie_embeddings=False", "--config.lora.rank=4",
        f"--config.lora.base_dtype={base}", "--config.opt.learning_rate=0.1", f"--workdir={tmp_path}/run",
    ])  # fmt: skip
    lm = lj.load(tmp_path / "run")
    lm.save_hf(tmp_path / "whole", dtype="float32")
    lm.save_hf(tmp_path / "half", dtype="bfloat16")
    capsys.readouterr()
    for name in ("whole", "half") if base == "bfloat16" else ("half",):
        result = verify(tmp_path / "run", tmp_path / name, f"--out={tmp_path}/{name}_out")
        assert result["equal"] == (base == "bfloat16"), result["verdict"]
        kept = f"{tmp_path}/run keeps its frozen weights in int8; exports have the exact ones"
        assert (kept in capsys.readouterr().out.replace("\n", "")) == (base == "int8")


@pytest.mark.parametrize(
    ("tensor", "first"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.1.mlp.down_proj.weight", "layer 1"),
        ("model.norm.weight", "final norm"),
        ("lm_head.weight", "logits"),
    ],
)
def test_one_changed_tensor_is_found_where_it_is(deep, tmp_path, tensor, first):
    changed = copied(deep / "model", tmp_path / "changed", tensor)
    result = verify(deep / "model", changed)
    assert not result["equal"] and result["first_departing"] == first
    assert f"DIFFERENT: the first layer that departs is {first} (" in result["verdict"]


def test_a_change_is_found_beside_rounding(deep, tmp_path, monkeypatch, capsys):
    """Weights of a bfloat16 tensor by a sixteenth, at exit code 1."""

    def larger(array):
        array[:, :4] *= array.dtype.type(1.0625)
        return array

    assert verify(deep / "half", copied(deep / "half", tmp_path / "same"))["verdict"] == "equal to the last bit"
    changed = copied(deep / "half", tmp_path / "changed", "model.layers.1.mlp.up_proj.weight", larger)
    monkeypatch.setattr(sys, "argv", ["main", "--mode=verify", f"--workdir={deep}/model", f"--against={changed}"])
    with pytest.raises(SystemExit) as caught:
        main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert caught.value.code == 1 and result["first_departing"] == "layer 1"
    assert "beyond the rounding of bfloat16 weights: the first layer that departs is layer 1" in result["verdict"]


def test_what_is_no_number_is_different(deep, tmp_path):
    changed = copied(deep / "model", tmp_path / "nan", "model.layers.1.mlp.up_proj.weight", lambda a: a * np.nan)
    result = verify(deep / "model", changed)
    assert result["first_departing"] == "layer 1" and result["logit_max_abs"] is None and not result["equal"]


def test_dropped_rows_and_other_settings_are_said(deep, tmp_path, capsys):
    lm = lj.load(deep / "model")
    export(lm.run.params, lm.run.config.model, lm.run.mesh, tmp_path / "cut", ExportSettings(num_tokens=500))
    result = verify(deep / "model", tmp_path / "cut")
    assert result["equal"] and result["vocabulary_rows"] == {"workdir": 512, "against": 500, "compared": 500}
    assert "512 and 500 rows of the vocabulary: the first 500 are compared" in capsys.readouterr().out
    odd = copied(deep / "model", tmp_path / "odd")
    values = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-2}))
    result = verify(deep / "model", odd)
    assert result["settings_that_differ"] == ["`model.norm_eps` is 1e-05 and 0.01"]
    assert result["first_departing"] == "layer 0"


def test_wrong_input_is_one_line(deep, tmp_path):
    for name, changes in (("two", {"num_layers": 2}), ("wide", {"num_layers": 3, "embed_dim": 64})):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        config = to_dict(small_config(tmp_path, model=changes))
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "run.json").write_text("{}")
    model = deep / "model"
    for arguments, words in (
        ([f"--workdir={model}"], "nothing to compare with; pass --against=DIR"),
        ([f"--against={model}"], "pass --workdir=DIR and --against=DIR"),
        ([f"--workdir={model}", f"--against={tmp_path}/none"], "none: has no config.json; name a run's directory"),
        ([f"--workdir={model}", f"--against={tmp_path}/two"], "`model.num_layers`=2 is not the 3 of .*model; only"),
        ([f"--workdir={model}", f"--against={tmp_path}/wide"], "`model.embed_dim`=64 is not the 32 of"),
        ([f"--workdir={model}", f"--against={model}", "--config.seed=1"], "--mode=verify: takes no --config"),
        ([f"--workdir={model}", f"--against={model}", "--max_positions=1"], "--max_positions=1; use 2 or more"),
        ([f"--workdir={model}", f"--against={model}", "--rows=1"], "--rows belongs to --mode=inspect, not to verify"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            run(["main", "--mode=verify", *arguments])
        assert "\n" not in str(caught.value)


def test_layers_are_read_in_groups_where_they_are_many(deep, monkeypatch):
    """The same states, whatever a device holds at a time."""
    lm = lj.load(deep / "model")
    inputs = compare.make_inputs(DEEP, 512, lm.run.mesh, 64, 0)[:1]
    whole = compare.measure(lm.run.params, DEEP, lm.run.mesh, inputs, 512)
    monkeypatch.setattr(compare, "STATE_BYTES", 64 * 32 * 4 * 2)
    parts = compare.measure(lm.run.params, DEEP, lm.run.mesh, inputs, 512)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    assert whole[0].states_NxPxD.shape == (5, 128, 32) and whole[0].logits_PxV.shape == (128, 512)
    np.testing.assert_allclose(
        whole[0].logits_PxV, whole[0].states_NxPxD[-1] @ np.asarray(lm.run.params["head"]), atol=1e-5
    )


@pytest.mark.parametrize("window", [0, 2000])
def test_inputs_hold_what_they_say(window):
    """Ids of the vocabulary, segments whose positions begin at 0, padding that is not compared, rows past windows."""
    model = dataclasses.replace(MODEL, window=window, max_positions=4096)
    for given in compare.make_inputs(model, 50, make_mesh(MeshConfig()), 10_000, 3):
        _, tokens, positions, segments, places = given
        assert tokens.min() >= 0 and tokens.max() == 49 and tokens.shape == positions.shape == segments.shape
        for row in range(len(tokens)):
            assert (segments[row][places[row]] > 0).all() and segments[row][0] == 1
            for segment in range(1, segments[row].max() + 1):
                found = positions[row][segments[row] == segment]
                assert found.tolist() == list(range(len(found)))
        assert (segments.max() > 2 and (segments == 0).any()) == (given.name == "packed")
        if given.name == "long":
            assert tokens.shape[1] == (2500 if window else 1024)
            assert places.max() == tokens.shape[1] - 1


def test_long_rows_go_past_a_scaling_threshold_unless_they_may_not():
    scaled = dataclasses.replace(MODEL, max_positions=131072, rope_scaling=RopeScalingConfig(factor=8.0))
    assert compare.long_length(scaled, 131072) == (10240, 8192)
    assert compare.long_length(scaled, 2048) == (2048, 8192)
    assert compare.long_length(MODEL, 10**6) == (MODEL.max_positions, 0)


def test_one_model_is_held_at_a_time(deep, monkeypatch):
    """Nothing of the first is left when the second is opened, weights that were rounded included."""
    held = []

    def opened(directory):
        gc.collect()
        assert all(reference() is None or reference().is_deleted() for reference in held)
        found = open_published(directory)
        held.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(found.params))
        return found

    monkeypatch.setattr("llm_jepa_jax.verify.open_published", opened)
    assert verify(deep / "model", deep / "half")["verdict"] == "equal up to the rounding of bfloat16 weights"
    assert len(held) > 20
