# SPDX-License-Identifier: Apache-2.0
"""OpenELM, whose layers differ in shape, against its NumPy oracle: in, packed, generating, trained, and out again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.checkpoint.hf_directory import open_directory
from llm_jepa_jax.checkpoint.hf_import import read_parameters
from llm_jepa_jax.checkpoint.safetensors import StoredTensor, Writer, read_header
from llm_jepa_jax.config import Config, MeshConfig, ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.generate import Generator
from llm_jepa_jax.flops import model_flops
from llm_jepa_jax.main import run
from llm_jepa_jax.models.families.registry import family_of, read_model
from llm_jepa_jax.models.transformer import forward_states
from llm_jepa_jax.objectives.parameters import init_parameters
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.run_directory import open_run
from llm_jepa_jax.train.step import gradients
from tests.conftest import CACHE, SMALL_MODEL, host_batch, small_config, small_data
from tests.openelm_oracle import forward, greedy, random_tensors, widths

CONFIG = {
    "model_type": "openelm", "architectures": ["OpenELMForCausalLM"], "vocab_size": 512, "num_transformer_layers": 3,
    "model_dim": 48, "head_dim": 8, "num_gqa_groups": 2, "qkv_multipliers": [0.5, 1.4], "ffn_multipliers": [0.5, 3.0],
    "ffn_dim_divisor": 8, "ffn_with_glu": True, "normalize_qk_projections": True, "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm", "share_input_output_layers": True, "rope_freq_constant": 10000,
    "rope_max_length": 1024, "max_context_length": 512, "initializer_range": 0.02, "use_cache": True,
    "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig"}, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (150, 31, 90)


def write(directory, config=CONFIG, **changes):
    """A directory of random weights as published, and them."""
    config = config | changes
    tensors = random_tensors(config)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {name: array.shape for name, array in tensors.items()}
    writer = Writer(directory / "model.safetensors", shapes, np.dtype(np.float32))
    for name, array in tensors.items():
        writer.add(name, array)
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The directory, its tensors, and ours."""
    directory = tmp_path_factory.mktemp("openelm")
    tensors = write(directory)
    return directory, tensors, lj.load(directory)


def error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 512, length).astype(np.int32) for length in LENGTHS]


def test_logits_are_the_oracles(published):
    _, tensors, lm = published
    assert lm.run.config.model.layer_heads == (4, 6, 8) and lm.run.config.model.layer_mlp_dims == (24, 88, 144)
    assert widths(CONFIG) == ([4, 6, 8], [24, 88, 144])
    for tokens, logits in zip(sequences(), lm.logits(sequences()), strict=True):
        assert error(logits, forward(CONFIG, tensors, tokens)[1]) < 1e-4


def test_every_layer_of_packed_segments_is_that_of_the_sequence_alone(published):
    """Each segment at positions of its own, the second one far on."""
    _, tensors, lm = published
    starts, config = (0, 1900, 3), lm.run.config.model
    positions = [np.arange(start, start + length) for start, length in zip(starts, LENGTHS, strict=True)]
    segments = np.repeat(np.arange(1, len(LENGTHS) + 1), LENGTHS)[None]
    states = tuple((layer, layer == 3) for layer in range(4))
    ours = forward_states(
        lm.run.params, config, np.concatenate(sequences())[None], np.concatenate(positions)[None], segments,
        states=states, dtype=jnp.float32,
    )  # fmt: skip
    place = 0
    for tokens, start in zip(sequences(), starts, strict=True):
        for state, expected in zip(ours, forward(CONFIG, tensors, tokens, start)[0], strict=True):
            assert error(state[0, place : place + len(tokens)], expected) < 1e-5
        place += len(tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"share_input_output_layers": False, "normalize_qk_projections": False},
        {"ffn_with_glu": False, "qkv_multipliers": [1.0, 1.0], "num_gqa_groups": 3},
    ],
)
def test_other_settings(tmp_path, changes):
    """Untied and without norms of heads; without a gate and with heads alike."""
    tensors = write(tmp_path, **changes)
    lm = lj.load(tmp_path)
    assert not lm.run.config.model.uniform
    tokens = sequences()[1]
    assert error(lm.logits([tokens])[0], forward(CONFIG | changes, tensors, tokens)[1]) < 1e-4
    assert family_of(lm.run.config.model).model_type == "openelm"


def test_greedy_answers_are_the_oracles(published, tokenizer):
    _, tensors, lm = published
    rng, new = np.random.default_rng(1), 8
    prompts = [[tokenizer.bos_id, *rng.integers(20, 512, length).tolist()] for length in range(1, 29)]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    generate = Generator(lm.run.config.model, tokenizer, mesh, new, 32, jnp.float32)
    answers = generate(jax.device_get(lm.run.params), prompts)
    expected = [greedy(CONFIG, tensors, prompt, new, generate._forbidden_V, tokenizer.stop_ids) for prompt in prompts]
    clear = [i for i, (_, lead) in enumerate(expected) if lead > 1e-3]
    assert len(clear) >= 20
    assert [answers[i][0] for i in clear] == [expected[i][0] for i in clear]
    assert len({tuple(expected[i][0]) for i in clear}) >= 20


def test_only_the_wanted_rows_are_read(tmp_path, monkeypatch):
    """Of matrices that hold several parameters too: over all devices every weight once."""
    write(tmp_path, num_transformer_layers=2, qkv_multipliers=[0.7, 1.4])
    counted, read = {}, StoredTensor.read

    def counting(self, index=()):
        array = read(self, index)
        counted[self.start] = counted.get(self.start, 0) + array.size
        return array

    checkpoint = open_directory(tmp_path)
    assert checkpoint.model.layer_kv_heads == (2, 4)
    monkeypatch.setattr(StoredTensor, "read", counting)
    cut = read_parameters(checkpoint, make_mesh(MeshConfig(fsdp=4, tensor=2)), "float32", 512)
    matrices = [tensor for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    assert all(counted[tensor.start] == np.prod(tensor.shape) for tensor in matrices)
    alone = read_parameters(checkpoint, make_mesh(MeshConfig(), jax.devices()[:1]), "float32", 512)
    jax.tree.map(np.testing.assert_array_equal, cut, alone)


@pytest.fixture(scope="module")
def trained(published, tokenizer, tmp_path_factory):
    """A run of one step that starts from the published model, in micro-batches, with recomputed layers."""
    place = tmp_path_factory.mktemp("trained")
    tokenizer.save(place)
    settings = {
        "init": {"checkpoint": str(published[0])},
        "text": {"tokenizer": str(place / "tokenizer.model")},
        "data": {
            "synthetic_train": 60, "synthetic_eval": 4, "row_length": 256, "rows_per_step": 16, "layout": "shared",
            "row_buckets": 1,
        },
        "mesh": {"data": 1, "fsdp": 8},
        "train": {"num_steps": 1, "num_epochs": 0, "micro_batches": 2, "remat": "full", "compile_cache": str(CACHE)},
        "opt": {"learning_rate": 1e-3, "warmup_steps": 0},
        "log": {"report": False, "tensorboard": False, "every_steps": 1},
        "eval": {"final_examples": 2, "max_new_tokens": 2},
    }  # fmt: skip
    (place / "settings.json").write_text(json.dumps(settings))
    run(["main", f"--config={place}/settings.json", f"--workdir={place}/run"])
    return place / "run"


def test_a_trained_model_comes_back(published, trained, tmp_path):
    """One training step, then export in several files: the oracle on them gives our logits."""
    result = run(["main", f"--workdir={trained}", "--mode=export", f"--out={tmp_path}/out"])
    assert result["step"] == 1
    ours = lj.load(trained)
    ours.save_hf(tmp_path / "files", shard_bytes=60_000)
    files = sorted((tmp_path / "files").glob("*.safetensors"))
    assert len(files) > 3
    stored = {name: tensor.read() for file in files for name, tensor in read_header(file).items()}
    assert {name: array.shape for name, array in stored.items()} == {n: a.shape for n, a in published[1].items()}
    assert all(np.abs(array - published[1][name]).max() > 1e-6 for name, array in stored.items())
    config = json.loads((tmp_path / "files" / "config.json").read_text())
    for tokens, logits in zip(sequences(), ours.logits(sequences()), strict=True):
        assert error(logits, forward(config, stored, tokens)[1]) < 1e-4
    for directory in ("out", "files"):
        again = lj.load(tmp_path / directory).run
        jax.tree.map(np.testing.assert_array_equal, again.params, open_run(trained).params)
        assert again.config.model == ours.run.config.model


def test_gradients_do_not_depend_on_how_a_step_is_cut(tmp_path, tokenizer):
    """Layers of their own, branches, and several parts whose layers are computed again."""
    layers = {"num_layers": 2, "layer_heads": (2, 4), "layer_kv_heads": (1, 2), "layer_mlp_dims": (32, 64)}
    found = []
    for parts, remat in ((1, "none"), (2, "dots")):
        config = small_config(
            tmp_path, data={"layout": "shared"}, train={"micro_batches": parts, "remat": remat}, model=layers
        )
        params = init_parameters(jax.random.key(0), config)
        batch = host_batch(small_data(config, tokenizer))
        found.append(jax.jit(lambda p, b, c=config: gradients(p, b, c)[1])(params, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), *found)


def test_published_sizes_are_read_and_written():
    """Those of the four published models, from their multipliers alone, and back into the same ones."""
    for width, layers, head_dim, ends in (
        (1280, 16, 64, (12, 20, 768, 5120)), (1536, 20, 64, (12, 24, 768, 6144)), (2048, 28, 64, (16, 32, 1024, 8192)),
        (3072, 36, 128, (12, 24, 1536, 12288)),
    ):  # fmt: skip
        values = CONFIG | {
            "model_dim": width, "num_transformer_layers": layers, "head_dim": head_dim, "num_gqa_groups": 4,
            "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0], "ffn_dim_divisor": 256,
        }  # fmt: skip
        family, model = read_model("x", values)
        heads, inner = model.layer_heads, model.layer_mlp_dims
        assert (heads[0], heads[-1], inner[0], inner[-1]) == ends and [list(heads), list(inner)] == [*widths(values)]
        written = family.write(model)
        assert written["qkv_multipliers"] == [0.5, 1.0] and written["num_query_heads"] == list(heads)
        assert read_model("x", written)[1] == model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 4}, "`num_experts`=4 is not known to this family"),
        ({"normalization_layer_name": "layer_norm"}, "`normalization_layer_name` is 'layer_norm', which is not"),
        ({"num_query_heads": [4, 6, 6]}, "`qkv_multipliers` and `num_gqa_groups` give [4, 6, 8]"),
        ({"num_kv_heads": [4, 6, 8]}, "`qkv_multipliers` and `num_gqa_groups` give [2, 3, 4]"),
        ({"qkv_multipliers": [0.5, 0.7, 1.0]}, "it is a number, or the first and the last layer's"),
        ({"qkv_multipliers": "0.5"}, "`qkv_multipliers` is '0.5'; it must be float"),
        ({"ffn_multipliers": [0.5, "a"]}, "`ffn_multipliers` is [0.5, 'a']; it must be numbers"),
        ({"ffn_multipliers": [1, 2, 3, 4]}, "or one for each of 3 layers"),
        ({"activation_fn_name": "relu"}, "`activation_fn_name` is 'relu', which is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, words):
    with pytest.raises(UserError) as caught:
        read_model("config.json", CONFIG | changes)
    assert words in str(caught.value)


def test_layers_must_fit_each_other():
    for changes, words in (
        ({"layer_heads": (4, 2, 4)}, "`model.layer_heads`=(4, 2, 4) has 3 sizes; `model.num_layers`=2"),
        ({"layer_heads": (2, 2)}, "`model.num_heads`=4 is not the most of `model.layer_heads`=(2, 2); set 2"),
        ({"layer_heads": (3, 4)}, "`model.num_kv_heads`=2 does not divide `model.num_heads`=3 of layer 0"),
        ({"layer_mlp_dims": (0, 64)}, "`model.layer_mlp_dims`=(0, 64) has a size below 1"),
    ):
        with pytest.raises(UserError) as caught:
            resolve(dataclasses.replace(Config(), model=ModelConfig(**SMALL_MODEL | changes)), {})
        assert words in str(caught.value)
    model = ModelConfig(**SMALL_MODEL | {"layer_heads": (2, 4), "layer_kv_heads": (1, 2)})
    with pytest.raises(UserError, match="`mesh.tensor`=2 does not divide `model.num_kv_heads`=1; use a divisor"):
        resolve(dataclasses.replace(Config(), model=model), {"tensor": 2})


def test_arithmetic_is_counted_layer_by_layer():
    plain = ModelConfig(**SMALL_MODEL)
    alike = dataclasses.replace(plain, layer_heads=(4, 4), layer_mlp_dims=(64, 64))
    assert model_flops(alike, 10.0, 5.0, 100) == model_flops(plain, 10.0, 5.0, 100)
    halves = [dataclasses.replace(plain, num_heads=2), dataclasses.replace(plain, mlp_dim=32)]
    mixed = dataclasses.replace(plain, layer_heads=(2, 4), layer_mlp_dims=(64, 32))
    whole = [model_flops(model, 10.0, 5.0, 100) for model in (*halves, mixed)]
    assert whole[2] == pytest.approx((whole[0] + whole[1]) / 2)
