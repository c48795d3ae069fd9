# SPDX-License-Identifier: Apache-2.0
"""Adapters against the library PEFT: out, in, and merged, with equal logits."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.config import InitConfig, MeshConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.lora_config import LoraConfig
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.run_directory import export_adapter
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step
from tests.hf_models import make_model, reference
from tests.test_hf_parity import error, one_batch, sequences

pytestmark = pytest.mark.parity
TARGETS = {"llama3": ["q_proj", "v_proj", "down_proj"], "gemma2": ["o_proj", "gate_proj"], "phi": ["dense", "fc1"]}


@pytest.fixture(scope="module", params=list(TARGETS))
def case(request, tmp_path_factory):
    """The name, and a published model's directory."""
    for package in ("torch", "transformers", "peft"):  # here, not above: imports of seconds
        pytest.importorskip(package)
    directory = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(directory)
    return request.param, directory


def base_of(directory):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32", attn_implementation="eager")


def trained(directory, lora, vocab_size=0, steps=1, mesh=None):
    """A model with adapters after some steps."""
    lm = lj.load(directory)
    mesh = mesh or lm.run.mesh
    config = dataclasses.replace(
        lm.run.config, lora=lora, opt=dataclasses.replace(lm.run.config.opt, learning_rate=0.02),
        init=InitConfig(str(directory), new_rows="normal"),
    )  # fmt: skip
    if vocab_size:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    factory = state_factory(resolve(config, mesh.shape), mesh, steps)
    state, step = factory.create(), make_train_step(factory, steps)
    for _ in range(steps):
        state, metrics = step(state, one_batch(mesh.size, mesh))
    assert np.isfinite(float(metrics["last"]["total_loss"]))
    return dataclasses.replace(lm, run=dataclasses.replace(lm.run, config=config, mesh=mesh, params=state.whole))


def assert_equal_logits(lm, model, different_from=None):
    for tokens, ours in zip(sequences(), lm.logits(sequences()), strict=True):
        theirs = reference(model.eval(), tokens)[1]
        assert error(ours, theirs) < 1e-4
        if different_from is not None:
            assert error(ours, reference(different_from.eval(), tokens)[1]) > 1e-2


def test_a_trained_adapter_loads_in_peft_and_here_and_merged_in_transformers(case, tmp_path):
    import peft

    _, directory = case
    lm = trained(directory, LoraConfig(rank=4, alpha=12.0, dropout=0.1), steps=2)
    lm.save_adapter(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(base_of(directory), tmp_path / "adapter")
    assert_equal_logits(lm, model, different_from=base_of(directory))
    again = lj.load(directory, adapter=tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, again.run.params, lm.run.params)
    lm.save_hf(tmp_path / "merged")
    assert_equal_logits(lm, base_of(tmp_path / "merged"))
    with pytest.raises(UserError, match="is not empty"):
        lm.save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("rslora", [False, True])
def test_a_random_adapter_of_peft_loads_here(case, tmp_path, rslora):
    import peft

    name, directory = case
    config = peft.LoraConfig(
        r=6, lora_alpha=10, target_modules=TARGETS[name], init_lora_weights=False, use_rslora=rslora, lora_dropout=0.3,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(base_of(directory), config)
    model.save_pretrained(tmp_path)
    lm = lj.load(directory, adapter=tmp_path)
    assert (lm.run.config.lora.rank, lm.run.config.lora.rslora) == (6, rslora)
    assert_equal_logits(lm, model, different_from=base_of(directory))
    lm.save_adapter(tmp_path / "again")
    assert_equal_logits(lm, peft.PeftModel.from_pretrained(base_of(directory), tmp_path / "again"))


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_merging_takes_the_exact_base(case, tmp_path, kind):
    """A quantised run's merged export is the published weights plus what the adapters add."""
    _, directory = case
    mesh = make_mesh(MeshConfig())
    lm = trained(directory, LoraConfig(rank=4, base_dtype=kind, tile_size=8), mesh=mesh)
    lm.save_hf(tmp_path / "merged")
    lm.save_adapter(tmp_path / "adapter")
    exact = lj.load(directory, adapter=tmp_path / "adapter")
    assert_equal_logits(exact, base_of(tmp_path / "merged"), different_from=base_of(directory))


def test_new_token_rows_go_with_the_adapter(case, tmp_path):
    """The base is resized first, as for any adapter that was trained so."""
    import peft

    _, directory = case
    lm = trained(directory, LoraConfig(rank=2), vocab_size=104)
    lm.save_adapter(tmp_path)
    base = base_of(directory)
    base.resize_token_embeddings(104)
    model = peft.PeftModel.from_pretrained(base, tmp_path)
    tokens = np.concatenate([sequences()[0][:20], [96, 100, 103]])
    assert error(lm.logits([tokens])[0], reference(model.eval(), tokens)[1]) < 1e-4


REFUSED = {
    "use_dora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}, "layers_to_transform": [0],
    "bias": "all", "init_lora_weights": "pissa", "r": 0, "peft_type": "IA3", "a_new_feature": 1,
}  # fmt: skip


def test_what_is_not_supported_is_refused_by_name(tmp_path):
    pytest.importorskip("transformers")
    make_model("llama3").save_pretrained(tmp_path / "base")
    export_adapter(trained(tmp_path / "base", LoraConfig(rank=2)).run, tmp_path / "adapter")
    place = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(place.read_text())
    for name, value in REFUSED.items():
        place.write_text(json.dumps(settings | {name: value}))
        with pytest.raises(UserError, match=f"`{name}` is "):
            lj.load(tmp_path / "base", adapter=tmp_path / "adapter")
    place.write_text(json.dumps(settings | {"r": 3}))
    with pytest.raises(UserError, match=r"lora_A of model.layers.0.self_attn.q_proj is \[2, 48\], not \[3, 48\]"):
        lj.load(tmp_path / "base", adapter=tmp_path / "adapter")
    place.write_text(json.dumps(settings))
    make_model("llama3", num_hidden_layers=2).save_pretrained(tmp_path / "smaller")
    with pytest.raises(UserError, match=r"has model.layers.2.self_attn.q_proj, .* which is not of this model"):
        lj.load(tmp_path / "smaller", adapter=tmp_path / "adapter")
