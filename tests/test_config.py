# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib.util
import json

import pytest
from jax.sharding import AxisType

from llm_jepa_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    base_config,
    describe,
    freeze,
    to_dict,
)
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.from_json import load_json
from llm_jepa_jax.main import parse
from llm_jepa_jax.parallel.mesh import make_mesh, mesh_shape
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.schema import flatten
from llm_jepa_jax.vocabulary import with_vocabulary
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "configs"
PRESETS = sorted(
    str(path.relative_to(FOLDER).with_suffix("")) for path in [*FOLDER.glob("*.py"), *FOLDER.glob("paper/*.py")]
)


def preset(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def test_the_presets_are_there():
    assert len(PRESETS) == 21 and {"tiny", "finetune", "llama8b", "openelm_1b", "paper/pretrain_llama1b"} <= set(
        PRESETS
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_and_take_smoke(name):
    config = freeze(preset(name)())
    resolve(config, {"tensor": config.mesh.tensor})
    small = freeze(preset(name)("smoke"))
    resolve(small, {"fsdp": 4, "tensor": 2})
    assert small.model.num_layers == 2 and small.train.num_steps == 4
    assert small.train.dtype == config.train.dtype and small.model.rope_scaling == config.model.rope_scaling
    with pytest.raises(UserError, match="presets take `:smoke`"):
        preset(name)("tiny")


def test_every_key_has_a_meaning_and_its_default_round_trips(tmp_path):
    assert freeze(base_config()) == Config()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(Config())))
    assert freeze(load_json(path)) == Config()
    text = describe()
    for key in flatten(to_dict(Config())):
        assert f"`{key}`" in text


def test_sizes_by_layer_come_from_json_and_from_the_command_line(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"model": {"num_layers": 2, "layer_mlp_dims": [64, 512]}}))
    assert freeze(load_json(tmp_path / "c.json")).model.layer_mlp_dims == (64, 512)
    flags = parse(["main", f"--config={REPOSITORY}/configs/tiny.py", "--config.model.layer_mlp_dims=(64,512)"])
    assert freeze(flags.config).model.layer_mlp_dims == (64, 512)


def test_wrong_keys_types_and_choices_name_the_fix(tmp_path):
    for values, words in (
        ({"opt": {"lr": 1.0}}, "unknown key `opt.lr`; keys here are beta1"),
        ({"opt": 3}, "`opt` is a section"),
        ({"seed": "a"}, "`seed`='a' has type str; it takes int"),
        ({"data": {"shuffle": 1}}, "`data.shuffle`=1 has type int; it takes bool"),
        ({"model": {"layer_heads": 4}}, "`model.layer_heads`=4 has type int; it takes tuple"),
        ({"model": {"layer_heads": [4, 1.5]}}, "`model.layer_heads`=(4, 1.5); it takes whole numbers, such as (2,4)"),
        ({"opt": {"schedule": "step"}}, "`opt.schedule`='step'; use one of cosine, linear, constant"),
    ):
        with pytest.raises(UserError) as caught:
            freeze(values)
        assert words in str(caught.value)
    assert freeze({"opt": {"learning_rate": 1}}).opt.learning_rate == 1.0
    for content, words in (("{", "not JSON"), ("[]", "is a JSON object"), ('{"model": {"width": 3}}', "unknown key")):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(UserError, match=words):
            load_json(tmp_path / "c.json")


def test_mesh_fills_and_refuses():
    assert mesh_shape(MeshConfig(), 8) == (1, 8, 1, 1, 1)
    assert mesh_shape(MeshConfig(data=1, fsdp=-1, tensor=2), 8) == (1, 1, 4, 1, 2)
    for config, words in (
        (MeshConfig(fsdp=3), "`mesh.fsdp`=3 does not divide 8 devices; use 1, 2, 4, 8, or -1 to fill"),
        (MeshConfig(fsdp=4, tensor=4), "`mesh.tensor`=4 does not divide 2 devices"),
        (MeshConfig(data=2, fsdp=2), "leaves 4 of 8 devices idle; use 4"),
        (MeshConfig(fsdp=-1), "`mesh.data` and `mesh.fsdp` are both -1"),
        (MeshConfig(fsdp=0), "`mesh.fsdp`=0; use a positive number"),
    ):
        with pytest.raises(UserError) as caught:
            mesh_shape(config, 8)
        assert words in str(caught.value)


def test_mesh_axes_are_automatic():
    assert set(make_mesh(MeshConfig()).axis_types) == {AxisType.Auto}


def test_contradictions_name_key_value_and_fix():
    for changes, words in (
        ({"model": ModelConfig(head_dim=5)}, "`model.head_dim`=5 is odd"),
        ({"data": DataConfig(train="")}, "names no data"),
        ({"data": DataConfig(pair_slots=600)}, "`data.pair_slots`=600 is above `data.row_length`=512"),
        ({"data": DataConfig(train="a.jsonl", eval_share=0.0)}, "`data.eval_share`=0.0 leaves no split"),
        ({"seed": -1}, "`seed`=-1 must not be negative"),
    ):
        with pytest.raises(UserError) as caught:
            resolve(dataclasses.replace(Config(), **changes), {})
        assert words in str(caught.value)
    with pytest.raises(UserError, match=r"`mesh.fsdp`=5 does not divide `model.embed_dim`=192"):
        resolve(dataclasses.replace(Config(), data=DataConfig(rows_per_step=40)), {"fsdp": 5})


def test_vocabulary_is_the_tokenizers_unless_set():
    """And is stored with as many rows as the mesh can cut, the same for every power of two."""
    assert with_vocabulary(Config(), 1000, 2).model.vocab_size == 1000
    sizes = {tensor: with_vocabulary(Config(), 1001, tensor).model.padded_vocab_size for tensor in (1, 2, 8, 128, 3)}
    assert sizes == {1: 1024, 2: 1024, 8: 1024, 128: 1024, 3: 1152}
    assert with_vocabulary(Config(), 1152, 3).model.vocab_multiple == 128
    with pytest.raises(UserError, match=r"`model.vocab_size`=9 is below the 10 pieces of the tokenizer; use 10 or mor"):
        with_vocabulary(dataclasses.replace(Config(), model=ModelConfig(vocab_size=9)), 10, 1)
