# SPDX-License-Identifier: Apache-2.0
"""Published directories without PyTorch: recorded goldens, errors, memory, sharding, and runs that start from them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.checkpoint.hf_directory import INDEX, SINGLE, open_directory
from llm_jepa_jax.checkpoint.hf_export import ExportSettings, export
from llm_jepa_jax.checkpoint.hf_import import read_parameters
from llm_jepa_jax.checkpoint.initial import initial_tokenizer, open_initial
from llm_jepa_jax.checkpoint.safetensors import StoredTensor, Writer, read_header
from llm_jepa_jax.config import Config, InitConfig, MeshConfig, ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.models.families.registry import family_of, read_model
from llm_jepa_jax.models.transformer import abstract_params, init_params
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import parameter_shardings
from llm_jepa_jax.run_directory import open_run
from llm_jepa_jax.text.tokenizer import load_tokenizer
from tests.chat_families import write_family
from tests.conftest import REPOSITORY, SMALL_MODEL
from tests.test_initial import QUICK

MODEL = dataclasses.replace(ModelConfig(**SMALL_MODEL), family="llama")


def write(directory, model=MODEL, dtype="float32", shard_bytes=60_000, **settings):
    """A directory of random weights, and them."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = parameter_shardings(mesh, abstract_params(model, jnp.dtype(dtype))[1])
    make = jax.jit(lambda key: init_params(key, model, jnp.dtype(dtype)), out_shardings=shardings)
    params = make(jax.random.key(0))
    export(params, model, mesh, directory, ExportSettings(dtype, shard_bytes, **settings))
    return params


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written") / "model"
    write(directory)
    return directory


@pytest.fixture
def published(written, tmp_path):
    """A directory of its own for each test."""
    return shutil.copytree(written, tmp_path / "model")


def edit(path, **changes):
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values[name] = value
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


GOLDENS = np.load(REPOSITORY / "tests" / "data" / "hf_goldens.npz")
"""Made by `record_hf_goldens.py`."""


@pytest.mark.parametrize("case", sorted({name.partition("/")[0] for name in GOLDENS.files}))
def test_recorded_logits(tmp_path, case):
    """Of a miniature of every family, as `transformers` computed them."""
    prefix = f"{case}/weights/"
    weights = {name.removeprefix(prefix): GOLDENS[name] for name in GOLDENS.files if name.startswith(prefix)}
    (tmp_path / "config.json").write_text(str(GOLDENS[f"{case}/config"]))
    writer = Writer(tmp_path / SINGLE, {name: array.shape for name, array in weights.items()}, np.dtype(np.float16))
    for name, array in weights.items():
        writer.add(name, array)
    writer.close()
    lm = lj.load(tmp_path)
    (logits,), expected = lm.logits([GOLDENS[f"{case}/tokens"].tolist()]), GOLDENS[f"{case}/logits"]
    assert np.abs(logits[::5] - expected).max() < 1e-4 * np.abs(expected).max()
    assert family_of(lm.run.config.model).model_type == json.loads(str(GOLDENS[f"{case}/config"]))["model_type"]


@pytest.mark.parametrize(("dtype", "tie"), [("bfloat16", True), ("float32", False)])
def test_what_is_written_is_read_on_any_mesh(tmp_path, dtype, tie):
    model = dataclasses.replace(MODEL, tie_embeddings=tie, qkv_bias=True, family="qwen2")
    params = write(tmp_path / "m", model, dtype)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    checkpoint = open_directory(tmp_path / "m")
    assert checkpoint.model == model and checkpoint.dtype == dtype
    for sizes in ({"fsdp": 8}, {"fsdp": 2, "context": 2, "tensor": 2}, {}):
        read = read_parameters(checkpoint, make_mesh(MeshConfig(**sizes)), dtype, model.vocab_size)
        jax.tree.map(np.testing.assert_array_equal, read, params)


def test_safetensors_reads_and_is_read(tmp_path):
    """By the library that defines the format, in all three types; half precision is read into float32."""
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((4,), np.float32)}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        path = tmp_path / "x.safetensors"
        writer = Writer(path, {name: array.shape for name, array in arrays.items()}, jnp.dtype(dtype))
        for name, array in arrays.items():
            writer.add(name, array)
        writer.close()
        for name, array in library.load_file(path).items():
            assert array.dtype == dtype
            np.testing.assert_array_equal(array.astype(np.float32), arrays[name])
        library.save_file({name: array.astype(dtype) for name, array in arrays.items()}, path)
        found = read_header(path)
        np.testing.assert_array_equal(found["a"].read((slice(1, 2), slice(0, 2))).astype(np.float32), [[3.0, 4.0]])
    write(tmp_path / "half", dtype="float16")
    assert open_directory(tmp_path / "half").dtype == "float32"


def test_only_the_parts_of_a_device_are_read(published, monkeypatch):
    sizes, read = [], StoredTensor.read

    def counted(self, index=()):
        array = read(self, index)
        sizes.append((array.size, np.prod(self.shape)))
        return array

    monkeypatch.setattr(StoredTensor, "read", counted)
    checkpoint = open_directory(published)
    read_parameters(checkpoint, make_mesh(MeshConfig(fsdp=4, tensor=2)), "float32", MODEL.vocab_size)
    assert all(part == whole // 8 for part, whole in sizes if whole > 64)


def test_new_rows_are_the_mean_and_rows_can_be_dropped(published, tmp_path):
    model = dataclasses.replace(MODEL, vocab_size=520)
    params = read_parameters(open_directory(published), make_mesh(MeshConfig(tensor=2)), "float32", 520)
    assert params["embedding"].shape == (520, 32) and not np.asarray(params["embedding"][512:]).any()
    export(params, model, make_mesh(MeshConfig()), tmp_path / "cut", ExportSettings(num_tokens=512))
    np.testing.assert_array_equal(lj.load(tmp_path / "cut").run.params["embedding"], params["embedding"][:512])


@pytest.mark.parametrize("tie", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_starts_from_a_published_model(tmp_path, tokenizer, tie):
    """With its shape, its weights, mean rows for new tokens, and a file to go back to."""
    model = dataclasses.replace(MODEL, vocab_size=500, tie_embeddings=tie, norm_eps=1e-6)
    write(tmp_path / "model", model)
    tokenizer.save(tmp_path)
    tiny = [*QUICK, "--config.opt.learning_rate=1e-9"]
    flags = [f"--config.{key}" for key in (
        f"init.checkpoint={tmp_path}/model", f"text.tokenizer={tmp_path}/tokenizer.model", "model.embed_dim=32",
        "model.head_dim=8", "model.mlp_dim=64", "model.max_positions=1024",
    )]  # fmt: skip
    run([*tiny, *flags, f"--workdir={tmp_path}/run"])
    opened = open_run(tmp_path / "run")
    assert opened.config.model == dataclasses.replace(model, vocab_size=512, max_positions=1024, init_std=0.06)
    theirs = lj.load(tmp_path / "model").run.params
    names = ["embedding"] if tie else ["embedding", "head"]
    for name in names:
        ours, known = np.asarray(opened.params[name]), np.asarray(theirs[name])
        if name == "head":
            ours, known = ours.T, known.T
        known = known[:500]  # behind them is padding
        np.testing.assert_allclose(ours[:500], known[:500], atol=1e-6)
        np.testing.assert_allclose(ours[500:], np.tile(known[:500].mean(0), (12, 1)), atol=1e-6)
    result = run(["main", f"--workdir={tmp_path}/run", "--mode=export", f"--out={tmp_path}/out"])
    assert result["weight_files"] == 1 and result["step"] == 2
    back = lj.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, back.run.params, opened.params)
    with pytest.raises(UserError, match=r"`model.num_layers`=3 is not the 2 of `init.checkpoint`=.*model; set --con"):
        run([*tiny, *flags, f"--workdir={tmp_path}/other", "--config.model.num_layers=3"])
    with pytest.raises(UserError, match="out: is not empty; name a new directory"):
        back.save_hf(tmp_path / "out")


def first_shard(directory):
    return sorted(directory.glob("*.safetensors"))[0]


DAMAGES = {
    "missing shard": (lambda d: first_shard(d).unlink(), r"the shards model-00001-of-\d+.safetensors of model.safet"),
    "truncated": (
        lambda d: first_shard(d).write_bytes(first_shard(d).read_bytes()[:-100]), "it is cut short: download it again"
    ),
    "no header": (lambda d: first_shard(d).write_bytes(b"abc"), "is cut short or no safetensors file"),
    "corrupted header": (
        lambda d: first_shard(d).write_bytes(b"\xff" * 8 + first_shard(d).read_bytes()[8:]), "no safetensors file"
    ),
    "no index": (lambda d: (d / INDEX).unlink(), "has no model.safetensors and no model.safetensors.index.json"),
    "empty index": (lambda d: edit(d / INDEX, weight_map=...), "has no `weight_map` of tensor names to files"),
    "index names too many": (
        lambda d: edit(d / INDEX, weight_map=json.loads((d / INDEX).read_text())["weight_map"]
                       | {"x.weight": first_shard(d).name}),
        "names tensors that are not there: x.weight in model-00001",
    ),
    "index names too few": (
        lambda d: edit(d / INDEX, weight_map={
            name: file for name, file in json.loads((d / INDEX).read_text())["weight_map"].items() if "norm" not in name
        }),
        "does not name tensors that are there: model.",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: is not JSON"),
    "another family": (
        lambda d: edit(d / "config.json", model_type="qwen2"),
        "`attention_bias`=False, `mlp_bias`=False are not known to this family",
    ),
    "unknown family": (lambda d: edit(d / "config.json", model_type="bert"), "`model_type` is 'bert'; known are ll"),
    "another size": (
        lambda d: edit(d / "config.json", intermediate_size=65),
        r"6 of another shape: model.layers.0.mlp.down_proj.weight \[32, 64\], not \[32, 65\]",
    ),
    "more layers": (lambda d: edit(d / "config.json", num_hidden_layers=3), "9 missing: model.layers.2.in.* 5 more"),
    "fewer layers": (lambda d: edit(d / "config.json", num_hidden_layers=1), "9 too many: model.layers.1."),
    "unknown rope": (
        lambda d: edit(d / "config.json", rope_parameters={"rope_type": "xpos", "factor": 2.0}),
        "`rope_parameters.rope_type` is 'xpos', which is not supported; known are default, linear, llama3 and yarn",
    ),
    "rope by length": (
        lambda d: edit(d / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "`rope_parameters.rope_type` is 'dynamic', which is not supported; its base follows the sequence's length",
    ),
    "rope of two lengths": (
        lambda d: edit(d / "config.json", rope_parameters=None, rope_scaling={"type": "longrope"}),
        "`rope_scaling.type` is 'longrope', which is not supported; its frequencies change where a sequence gets long",
    ),
    "yarn without effect": (
        lambda d: edit(d / "config.json", rope_parameters={"rope_type": "yarn", "factor": 1.0, "attention_factor": 2}),
        "`rope_parameters.attention_factor` is 2.0, which is not supported; it is above 0, and goes with a `factor`",
    ),
    "unknown rope field": (
        lambda d: edit(d / "config.json", rope_scaling={"type": "linear", "factor": 2.0, "b": 1}, rope_parameters=...),
        "`rope_scaling.b`=1 is not known to this family",
    ),
    "two rope bases": (lambda d: edit(d / "config.json", rope_theta=7.0), "`rope_parameters.rope_theta` is 500000.0"),
    "unknown field": (
        lambda d: edit(d / "config.json", expert_count=8), "`expert_count`=8 is not known to this family; remove"
    ),
    "missing field": (lambda d: edit(d / "config.json", hidden_size=...), "has no `hidden_size`"),
    "wrong type": (lambda d: edit(d / "config.json", hidden_size="32"), "`hidden_size` is '32'; it must be int"),
    "activation": (lambda d: edit(d / "config.json", hidden_act="relu2"), "`hidden_act` is 'relu2', which is not supp"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_one_clear_line(published, damage):
    do, words = DAMAGES[damage]
    do(published)
    with pytest.raises(UserError, match=words) as caught:
        lj.load(published)
    assert "\n" not in str(caught.value)


def test_a_stored_head_that_is_tied_must_be_the_embedding(tmp_path):
    """And is left out where it is, as are tables of rotary frequencies."""
    params = write(tmp_path / "m", dataclasses.replace(MODEL, tie_embeddings=False))
    edit(tmp_path / "m" / "config.json", tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head.weight is not the embedding, though config.json ties them"):
        lj.load(tmp_path / "m")
    params |= {"head": params["embedding"].T}
    model = dataclasses.replace(MODEL, tie_embeddings=False)
    export(params, model, make_mesh(MeshConfig()), tmp_path / "n", ExportSettings())
    edit(tmp_path / "n" / "config.json", tie_word_embeddings=True)
    assert "head" not in lj.load(tmp_path / "n").run.params


def test_a_model_that_no_family_can_say_is_refused(tmp_path):
    odd = dataclasses.replace(MODEL, family="", norm="layer", scale_embeddings=True)
    with pytest.raises(UserError, match="no published family can say this model; nearest is one without `model.scale"):
        family_of(odd)
    with pytest.raises(UserError, match="family llama cannot say `model.qk_norm`=head; set model.family to another"):
        family_of(dataclasses.replace(MODEL, qk_norm="head"))
    with pytest.raises(UserError, match="`model.family`=nope is not known"):
        family_of(dataclasses.replace(MODEL, family="nope"))
    assert family_of(dataclasses.replace(MODEL, qk_norm="head", family="")).model_type == "qwen3"


def test_both_rope_spellings_are_written_and_read(published):
    values = json.loads((published / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500000.0
    assert values["rope_scaling"] is None and values["rope_parameters"]["rope_type"] == "default"
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = values | {"rope_parameters": None, "rope_scaling": scaling | {"rope_type": "llama3"}}
    new = values | {"rope_theta": None, "rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 500000.0}}
    assert read_model("x", old) == read_model("x", new)
    assert read_model("x", old)[1].rope_scaling.factor == 8.0
    with pytest.raises(UserError, match="`rope_parameters` is 'not what `rope_scaling` says'"):
        read_model("x", old | {"rope_parameters": {"rope_type": "default"}})


def test_weights_without_rows_for_predictor_tokens_say_so(tmp_path, caplog):
    """Both views are then encoded without; weights that have the rows say nothing."""
    family = write_family("qwen3", tmp_path)  # its predictor tokens are new ids
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: (family / name).read_bytes() for name in names}
    tokenizer = load_tokenizer(family)
    known, size = tokenizer.vocab_size - len(tokenizer.new_ids), tokenizer.vocab_size
    for rows, words in ((known - known % 2, "no rows for predictor tokens"), (size + size % 2, "")):
        directory = tmp_path / str(rows)
        write(directory, dataclasses.replace(MODEL, vocab_size=rows), files=files)
        caplog.clear()
        lm = lj.load(directory)
        assert words in caplog.text and bool(caplog.text) == bool(words)
        assert np.array_equal(lm.encode(["a digit"]), lm.encode(["a digit"], 0)) == bool(words)


def test_token_ids_are_continued_without_a_tokenizer(tmp_path):
    """Each is the most probable of `logits`; the end token of the configuration ends an answer."""
    write(tmp_path / "m")
    lm = lj.load(tmp_path / "m")
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5]]
    answers = lm.generate(prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 6
        (logits,) = lm.logits([[*prompt, *answer]])
        assert logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == answer
    assert lm.generate(prompts, 6, temperature=1.5, top_k=1) == answers
    first, again, other = (lm.generate(prompts * 2, 6, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and first[:3] != first[3:]
    for settings in ({"top_k": 5}, {"temperature": "hot"}, {"temperature": 1, "top_p": 2}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match=f"^{list(settings)[-1]}="):
            lm.generate(prompts, **settings)
    end = answers[0][2]
    edit(tmp_path / "m" / "config.json", eos_token_id=end)
    assert lj.load(tmp_path / "m").generate(prompts[:1], max_new_tokens=6) == [answers[0][: answers[0].index(end)]]
    with pytest.raises(UserError, match=r"prompts\[1\] is empty or holds an id outside 0 to 511"):
        lm.generate([[1], [100_000]])
    with pytest.raises(UserError, match="pass texts, or sequences of token ids"):
        lm.generate([[1], "a"])
    with pytest.raises(UserError, match=r"ids\[0\] is no sequence of token ids; pass a list of sequences"):
        lm.logits([1, 2])


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """It has far fewer ids than the embedding has rows."""
    family = write_family("qwen3", tmp_path)
    files = {name: (family / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    write(tmp_path / "m", dataclasses.replace(MODEL, vocab_size=900), files=files)
    config = Config(init=InitConfig(checkpoint=str(tmp_path / "m")))
    with pytest.raises(UserError, match=r"its tokenizer has \d+ ids and its embedding 900 rows, so they are of differ"):
        initial_tokenizer(config, open_initial(config))


def test_hub_models_need_a_network_or_the_cache(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("huggingface_hub")
    with pytest.raises(UserError, match="nobody/nothing: no such directory, and the hub did not give it .*--local-dir"):
        lj.load("nobody/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="`pip install huggingface_hub`"):
        lj.load("nobody/nothing")


MEASURE = """
import pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
from llm_jepa_jax.checkpoint.hf_directory import open_directory
from llm_jepa_jax.checkpoint.hf_import import read_parameters
from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.parallel.mesh import make_mesh
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
checkpoint, mesh = open_directory(pathlib.Path(sys.argv[1])), make_mesh(MeshConfig())
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
before = peak()
params = read_parameters(checkpoint, mesh, "float32", checkpoint.model.vocab_size)
jax.block_until_ready(params)
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def test_the_host_holds_what_it_owns_and_little_more(tmp_path):
    """A file of several shards: the peak is the parameters and a slack of two tensors of a layer and 40 MiB."""
    model = ModelConfig(
        vocab_size=8000, embed_dim=512, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=2048
    )
    write(tmp_path / "m", model, shard_bytes=25_000_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "m")]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    more, owned = (int(word) for word in done.stdout.split())
    assert owned > 100 * 2**20  # held twice, it would be beyond the slack
    assert more < owned + 80 * 2**20, (more - owned) / 2**20
