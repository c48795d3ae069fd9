# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in object stores: `fsspec`'s store in memory stands where `gs://` would, and counts what is read."""

import json
import sys

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import llm_jepa_jax as lj
from llm_jepa_jax.checkpoint.hf_directory import open_directory
from llm_jepa_jax.checkpoint.hf_import import read_parameters
from llm_jepa_jax.checkpoint.places import place
from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.parallel.mesh import make_mesh
from tests.test_hf_files import MODEL, write
from tests.test_initial import QUICK

URL = "gs://bucket/model"


class Store(MemoryFileSystem):
    """The only part of `gs://` that is not the real one: where the bytes lie."""

    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]
    ranges: list = []
    broken = 0
    """How many writes are refused next."""
    silent = False
    """Nothing can be read."""

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").removeprefix("gcs://").strip("/") if path.strip("/") else ""

    def cat_file(self, path, start=None, end=None, **options):
        data = super().cat_file(path, start, end, **options)
        self.ranges.append((path.rpartition("/")[2], len(data)))
        return data

    def _open(self, path, mode="rb", **options):
        assert "r" not in mode or not path.endswith(".safetensors"), "weights are never read whole"
        if "w" in mode and Store.broken:
            Store.broken -= 1
            raise ConnectionError("the network is gone")
        if "r" in mode and Store.silent:
            raise ConnectionError("the network is gone")
        return super()._open(path, mode, **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tokenizer):
    """A local directory, and its copy in the store."""
    for name in Store.protocol:
        fsspec.register_implementation(name, Store, clobber=True)
    directory = tmp_path_factory.mktemp("published") / "model"
    write(directory)
    tokenizer.save(directory)
    fsspec.filesystem("gs").put(str(directory), URL, recursive=True)
    return directory


def test_a_model_in_a_store_is_the_local_one(stored):
    ours, theirs = lj.load(URL), lj.load(stored)
    np.testing.assert_array_equal(ours.logits([[5, 6, 7]])[0], theirs.logits([[5, 6, 7]])[0])
    assert str(ours.run.published) == URL
    assert ours.tokenizer.encode("a line") == theirs.tokenizer.encode("a line")


def test_no_byte_is_read_twice_and_none_without_need(stored):
    """Each device's rows are one range, and all ranges together the tensors, but for the headers of the files."""
    checkpoint = open_directory(place(URL))
    Store.ranges.clear()
    params = read_parameters(checkpoint, make_mesh(MeshConfig(fsdp=4, tensor=2)), "float32", MODEL.vocab_size)
    tensors = {tensor.path.name: 0 for tensor in checkpoint.tensors.values()}
    for name, count in Store.ranges:
        tensors[name] += count
    assert sum(tensors.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(params)) and len(tensors) == 3
    assert max(count for _, count in Store.ranges) == params["embedding"].nbytes // 8


def test_a_run_starts_from_a_store_and_is_exported_with_what_lies_there(stored, tmp_path):
    generation = {"eos_token_id": 300, "temperature": 0.5}
    fsspec.filesystem("gs").pipe(f"{URL}/generation_config.json", json.dumps(generation).encode())
    sizes = ("embed_dim", "head_dim", "mlp_dim", "max_positions")
    argv = [
        *QUICK, f"--config.init.checkpoint={URL}", f"--workdir={tmp_path}/run", "--config.opt.learning_rate=1e-9",
        *(f"--config.model.{name}={getattr(MODEL, name)}" for name in sizes),
    ]  # fmt: skip
    assert run(argv)["step"] == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"]["checkpoint"] == URL
    run(["main", f"--workdir={tmp_path}/run", "--mode=export", f"--out={tmp_path}/out"])
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = lj.load(tmp_path / "run").tokenizer.published_ids()  # the run's tokenizer has ends of its own
    assert kept == ids | {"temperature": 0.5} and kept["eos_token_id"] != 300
    params, known = lj.load(tmp_path / "out").run.params, lj.load(stored).run.params
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), params, known)
    assert max(jax.tree.leaves(moved)) < 1e-6


def test_an_export_goes_to_a_store(stored):
    lj.load(stored).save_hf("gs://bucket/out", shard_bytes=60_000)
    assert len(fsspec.filesystem("gs").glob("gs://bucket/out/*.safetensors")) == 3
    jax.tree.map(np.testing.assert_array_equal, lj.load("gs://bucket/out").run.params, lj.load(stored).run.params)
    with pytest.raises(UserError, match="gs://bucket/out: is not empty; name a new directory"):
        lj.load(stored).save_hf("gs://bucket/out")


def test_what_a_store_does_not_have_is_one_clear_line(stored, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="^gs://bucket/none: no such directory$"):
        lj.load("gs://bucket/none")
    store = fsspec.filesystem("gs")
    store.pipe("gs://bucket/cut/config.json", (stored / "config.json").read_bytes())
    with pytest.raises(
        UserError, match="gs://bucket/cut: has no model.safetensors and no model.safetensors.index.json"
    ):
        lj.load("gs://bucket/cut")
    checkpoint = open_directory(place(URL))
    path = next(iter(checkpoint.tensors.values())).path
    data = store.cat_file(str(path))
    store.pipe(str(path), data[:-5])
    try:
        with pytest.raises(UserError, match=r"gs://bucket/model/model-0000\d.*safetensors: .* download it again"):
            read_parameters(checkpoint, make_mesh(MeshConfig()), "float32", MODEL.vocab_size)
    finally:
        store.pipe(str(path), data)
    with pytest.raises(UserError, match="ftp://a/b: ftp:// is not known; use gs://, s3://, az://, hf://, or a dir"):
        lj.load("ftp://a/b")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="s3://a/b: s3:// needs s3fs, which is not installed; `pip install s3fs`"):
        lj.load("s3://a/b")
    with pytest.raises(UserError, match="hf://a/run: a run's directory lies here or in gs://, not in hf://; name such"):
        run([*QUICK, "--workdir=hf://a/run"])
    with pytest.raises(UserError, match=r"--workdir=gs://bucket/none: holds no run \(no config.json\)"):
        run(["main", "--workdir=gs://bucket/none", "--mode=eval"])
