# SPDX-License-Identifier: Apache-2.0
"""A run's files beside its checkpoints: on this machine, or a copy of what a store holds (one in memory here)."""

import logging
import os

import fsspec
import jax
import jax.numpy as jnp
import pytest

from llm_jepa_jax.checkpoint import manager
from llm_jepa_jax.checkpoint.manager import Checkpoints, restore_params, saved_steps
from llm_jepa_jax.checkpoint.places import place
from llm_jepa_jax.checkpoint.workdir import Workdir, opened
from llm_jepa_jax.config import CheckpointConfig
from llm_jepa_jax.errors import TryAgainError, UserError
from tests.test_places import Store

URL = "gs://bucket/runs/one"


@pytest.fixture
def store():
    """A store that works, without this run."""
    for name in Store.protocol:
        fsspec.register_implementation(name, Store, clobber=True)
    found = fsspec.filesystem("gs")
    if found.exists(URL):
        found.rm(URL, recursive=True)
    yield found
    Store.broken, Store.silent = 0, False


def held(store):
    return {path.removeprefix("/bucket/runs/one/"): store.cat(path) for path in store.find(URL)}


def test_a_directory_here_is_its_own_files(tmp_path):
    with opened(tmp_path / "run") as workdir:
        workdir.check_writable()
        assert workdir.files == workdir.place == tmp_path / "run" and workdir.checkpoints.parent == workdir.files
        (workdir.files / "config.json").write_text("{}")
        workdir.upload()
        workdir.finish(0.0)
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_files_go_to_the_store_once_and_come_back(store, caplog):
    """Appended lines, files in directories; no checkpoint and nothing half written."""
    with opened(URL) as workdir:
        workdir.check_writable()
        assert workdir.files.name == "one" and held(store) == {}
        (workdir.files / "eval").mkdir()
        (workdir.files / "eval" / "a-1.jsonl").write_text("answer\n")
        (workdir.files / "metrics.jsonl").write_text("1\n")
        (workdir.files / "x.json.12.part").write_text("half")
        workdir.upload()
        assert held(store) == {"eval/a-1.jsonl": b"answer\n", "metrics.jsonl": b"1\n"}
        with (workdir.files / "metrics.jsonl").open("a") as file:
            file.write("2\n")
        store.pipe(f"{URL}/eval/a-1.jsonl", b"not touched again")
        workdir.finish(0.0)
    assert held(store) == {"eval/a-1.jsonl": b"not touched again", "metrics.jsonl": b"1\n2\n"}
    assert not workdir.files.exists()
    store.pipe(f"{URL}/checkpoints/3/state/d/0", b"terabytes")
    store.pipe(f"{URL}/profile/trace", b"gigabytes")
    again = Workdir(URL)
    assert {p.name for p in again.files.rglob("*") if p.is_file()} == {"metrics.jsonl", "a-1.jsonl"}
    (again.files / "eval" / "a-1.jsonl").unlink()
    again.finish(0.0)
    assert store.cat(f"{URL}/eval/a-1.jsonl") == b"not touched again", "what is there is never removed"


def test_a_store_that_fails_keeps_the_run_alive_and_gets_everything_later(store, caplog):
    workdir = Workdir(URL)
    (workdir.files / "metrics.jsonl").write_text("1\n")
    Store.broken = 2
    with caplog.at_level(logging.WARNING):
        workdir.upload()
        workdir.upload()
    assert caplog.text.count(f"{URL}: FILES ARE NOT WRITTEN (the network is gone); they are kept in") == 1
    assert held(store) == {}
    Store.broken = 1
    (workdir.files / "metrics.jsonl").write_text("1\n2\n")
    workdir.finish(0.01)
    assert held(store) == {"metrics.jsonl": b"1\n2\n"} and not workdir.files.exists()


def test_what_cannot_be_written_at_the_end_stays_here(store):
    with pytest.raises(UserError, match=f"^{URL}: a, b cannot be written: the network is gone; copy them from /"):  # noqa: SIM117
        with opened(URL) as workdir:
            (workdir.files / "a").write_text("1")
            (workdir.files / "b").write_text("2")
            Store.broken = 9
            workdir.finish(0.01)
    assert (workdir.files / "a").read_text() == "1"


def test_a_run_that_fails_leaves_its_words_in_the_store(store):
    with pytest.raises(ZeroDivisionError), opened(URL) as workdir:
        (workdir.files / "metrics.jsonl").write_text("1\n")
        raise ZeroDivisionError
    assert held(store) == {"metrics.jsonl": b"1\n"} and not workdir.files.exists()


def test_a_store_that_takes_nothing_is_refused_before_any_work(store):
    Store.broken = 1
    with (
        pytest.raises(UserError, match=f"^--workdir={URL}: cannot write there: the network is gone; name another"),
        opened(URL) as workdir,
    ):
        workdir.check_writable()


def test_what_killed_processes_left_half_written_is_removed(tmp_path):
    """Not what somebody may be writing now, nor what is no small file of the run."""
    parts = ("run.json.0f.part", "eval/a-1.jsonl.0f.part", "tokenizer/tokenizer.json.0f.part", "checkpoints/q.0f.part")
    others = ("checkpoints/3/x.part", "report.html", "my.parts")
    for name in (*parts, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "eval" / "new.part").write_text("half")
    Workdir(tmp_path).clean()
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {*others, "eval/new.part"}


def test_a_checkpoint_in_a_store_that_does_not_answer_is_not_damaged(store, tmp_path, monkeypatch):
    """Nor is one that nobody finished a checkpoint; one that can be read and is wrong is damaged."""
    monkeypatch.setattr(manager, "READ_PAUSES", (0.0,))
    here, array = tmp_path / "checkpoints", jnp.arange(8.0)
    checkpoints = Checkpoints(here, CheckpointConfig())
    checkpoints.save(3, {"params": {"w": array}}, {})
    checkpoints.close()
    store.put(str(here), f"{URL}/checkpoints", recursive=True)
    store.pipe(f"{URL}/checkpoints/5/state/d/0", b"torn")
    there = place(URL) / "checkpoints"
    wanted = {"w": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)}
    assert saved_steps(here) == saved_steps(there) == [3]
    Store.silent = True
    with pytest.raises(TryAgainError, match=f"^{URL}/checkpoints/3: cannot be read now: the network is gone; start ag"):
        restore_params(there, wanted)
    Store.silent = False
    store.pipe(f"{URL}/checkpoints/3/meta/metadata", b"[]")
    with pytest.raises(UserError, match=r"none of the checkpoints \[3\] can be read"):
        restore_params(there, wanted)
