# SPDX-License-Identifier: Apache-2.0
"""Two or four real processes with four devices together, as one program; and the roll call before it."""

import json
import os
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from llm_jepa_jax.checkpoint.hf_directory import open_directory
from llm_jepa_jax.checkpoint.hf_export import ExportSettings, export
from llm_jepa_jax.checkpoint.hf_import import read_parameters
from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.errors import TryAgainError, UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.parallel import processes
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.processes import Rank, roll_call
from tests.conftest import REPOSITORY
from tests.test_hf_files import MODEL, write
from tests.test_initial import QUICK

SIZES = ("embed_dim", "head_dim", "mlp_dim", "max_positions")
"""What the preset's miniature has otherwise."""
DEVICES = 4
"""Of all processes together."""


def free_port():
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def together(*command, num_processes=2):
    """stdout and stderr of each of several processes that run as one."""
    address, flag = f"localhost:{free_port()}", "--xla_force_host_platform_device_count"
    started = []
    for index in range(num_processes):
        rank = {
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num_processes), "JAX_PROCESS_ID": str(index),
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}={DEVICES // num_processes}",
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, *command], cwd=REPOSITORY, env=os.environ | rank,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (out, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, out + err
    return ended


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer):
    """A directory of several shards, with a tokenizer."""
    directory = tmp_path_factory.mktemp("published") / "model"
    write(directory, dtype="bfloat16", shard_bytes=30_000)
    tokenizer.save(directory)
    return directory


TASKS = ("exact_match", "perplexity")


def evaluation(workdir, step):
    """What an evaluation wrote: a line for each record of each task, and the summaries."""
    lines = [(workdir / "eval" / f"{task}-{step}.jsonl").read_text().splitlines() for task in TASKS]
    summaries = [json.loads((workdir / "eval" / f"{task}-{step}.json").read_text()) for task in TASKS]
    assert len(list((workdir / "eval").iterdir())) == 2 * len(TASKS), "nothing else"
    return [[json.loads(line) for line in task] for task in lines] + summaries


def same(ours, theirs):
    """Equal, but for the rounding of numbers."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == (pytest.approx(theirs, rel=1e-5) if isinstance(ours, float) else theirs)


def check_two_evaluate_as_one(workdir, trained):
    """Answers and scores of a run's last step: as written in training, by two processes again, and by one."""
    in_training = evaluation(workdir, trained["step"])
    argv = ("--mode=eval", f"--workdir={workdir}")
    (out, err), (other_out, other_err) = together("-m", "llm_jepa_jax.main", *argv)
    assert other_out == "" and other_err == "" and err.count("exact_match-2: ") == 1, "only process 0 writes text"
    by_two, scores = evaluation(workdir, trained["step"]), json.loads(out.splitlines()[-1])
    one = run(["main", *argv])
    by_one = evaluation(workdir, trained["step"])
    assert [len(task) for task in by_one[:2]] == [5, 5] and all("answer" in line for line in by_one[0])
    assert same(by_two, in_training) and same(by_two, by_one) and same(scores, one)
    assert all(trained[task] == pytest.approx(scores[task], rel=1e-5) for task in TASKS)


def test_two_processes_train_and_evaluate_as_one_and_one_goes_on(published, tmp_path):
    """From published weights, over parameters that are cut across processes, to the losses of one process alone."""
    argv = [
        *QUICK[1:], f"--config.init.checkpoint={published}",
        "--config.log.every_steps=1", "--config.opt.schedule=constant", "--config.mesh.fsdp=4",
        f"--config.eval.tasks={','.join(TASKS)}", "--config.eval.final_examples=5", "--config.eval.max_new_tokens=4",
        *(f"--config.model.{name}={getattr(MODEL, name)}" for name in SIZES),
    ]  # fmt: skip
    both, alone = tmp_path / "both", tmp_path / "alone"
    (out, err), (other_out, other_err) = together(
        "-m", "llm_jepa_jax.main", *argv, "--config.train.num_steps=2", f"--workdir={both}"
    )
    assert json.loads(out.splitlines()[-1])["step"] == 2 and "2 processes on 1 hosts: " in err
    assert other_out == "" and other_err == "", "only process 0 writes text"
    check_two_evaluate_as_one(both, json.loads(out.splitlines()[-1]))
    run(["main", *argv, "--config.train.num_steps=4", f"--workdir={both}"])
    run(["main", *argv, "--config.train.num_steps=4", f"--workdir={alone}"])
    check_same_training(both, alone)


def check_same_training(*workdirs):
    """Four steps of two runs."""
    lines = [
        [line for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if "ntp_loss" in line]
        for workdir in workdirs
    ]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4]
    for ours, theirs in zip(*lines, strict=True):
        for name in ("total_loss", "ntp_loss", "jepa_loss", "grad_norm", "examples"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.slow
def test_four_processes_train_as_one(published, tmp_path):
    argv = [
        *QUICK[1:], f"--config.init.checkpoint={published}", "--config.log.every_steps=1", "--config.train.num_steps=4",
        "--config.opt.schedule=constant", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
        *(f"--config.model.{name}={getattr(MODEL, name)}" for name in SIZES),
    ]  # fmt: skip
    (_, err), *others = together("-m", "llm_jepa_jax.main", *argv, f"--workdir={tmp_path / 'four'}", num_processes=4)
    assert "4 processes on 1 hosts: " in err and all(each == ("", "") for each in others)
    run(["main", *argv, f"--workdir={tmp_path / 'one'}"])
    check_same_training(tmp_path / "four", tmp_path / "one")


CHILD = """
import json, pathlib, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from llm_jepa_jax.checkpoint import safetensors
from llm_jepa_jax.checkpoint.hf_directory import open_directory
from llm_jepa_jax.checkpoint.hf_export import ExportSettings, export
from llm_jepa_jax.checkpoint.hf_import import read_parameters
from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.parallel.mesh import AXES, AXIS_TYPES, make_mesh
from llm_jepa_jax.parallel.processes import joined
from llm_jepa_jax.parallel.sharding import row_parts
directory, out = map(pathlib.Path, sys.argv[1:])
with joined(None, None, None, 60):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    mixed = np.asarray(mesh.devices).reshape(2, 2).T  # every other device is of the other process
    meshes = [mesh] + [Mesh(mixed.reshape(s), AXES, axis_types=AXIS_TYPES) for s in ((1, 4, 1, 1, 1), (1, 2, 1, 1, 2))]
    checkpoint, counts, read = open_directory(directory), [], safetensors.read_range
    safetensors.read_range = lambda path, start, count: counts.append(count) or read(path, start, count)
    params = read_parameters(checkpoint, mesh, "float32", checkpoint.model.vocab_size)
    export(params, checkpoint.model, mesh, out / "exported", ExportSettings(shard_bytes=30_000))
    whole = multihost_utils.process_allgather(params, tiled=True)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(whole)}
    np.savez(out / f"{jax.process_index()}.npz", **leaves)
    (out / f"{jax.process_index()}.json").write_text(json.dumps([sum(counts), [row_parts(m) for m in meshes]]))
"""


def test_import_and_export_of_two_processes_are_those_of_one(published, tmp_path):
    """Each reads half of the file, and the whole arrives everywhere it belongs."""
    together("-c", CHILD, str(published), str(tmp_path))
    checkpoint, mesh = open_directory(published), make_mesh(MeshConfig(fsdp=4))
    params = read_parameters(checkpoint, mesh, "float32", MODEL.vocab_size)
    said = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)]
    size = 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert [count for count, _ in said] == [size // 2, size // 2]
    assert [parts for _, parts in said] == [[[0], [0, 2], [0, 1]], [[1], [1, 3], [0, 1]]]
    for index in range(2):
        theirs = np.load(tmp_path / f"{index}.npz")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            np.testing.assert_array_equal(theirs[jax.tree_util.keystr(path)], leaf)
    export(params, checkpoint.model, mesh, tmp_path / "alone", ExportSettings(shard_bytes=30_000))
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert len(files) > 4 and files == sorted(path.name for path in (tmp_path / "exported").iterdir())
    for name in files:
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def call(ranks, timeout):
    """What each of several processes hears, or is told by an error of what kind."""
    heard = {}

    def take_part(rank):
        try:
            heard[rank.index] = roll_call(rank, f"host-{rank.index}", timeout)
        except (TryAgainError, UserError) as error:
            heard[rank.index] = error

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_the_roll_call_names_who_is_here_and_who_is_not():
    address = f"localhost:{free_port()}"
    heard = call([Rank(address, 3, index) for index in (2, 0, 1)], 30.0)
    assert heard == dict.fromkeys(range(3), ["host-0", "host-1", "host-2"])
    heard = call([Rank(address, 12, 0), Rank(address, 12, 5)], 0.5)
    missing = (
        "10 of 12 processes did not come within 0 s: 1, 2, 3, 4, 6, 7, 8, 9 and 2 more; here are 0 on host-0, 5 on"
    )
    assert str(heard[0]) == str(heard[5]) and str(heard[0]).startswith(missing), heard
    assert type(heard[0]) is type(heard[5]) is TryAgainError, "they may come next time"
    (alone,) = call([Rank(address, 2, 1)], 0.5).values()
    assert isinstance(alone, TryAgainError)
    assert str(alone).startswith(f"process 1 had no answer from process 0 at {address} within 0 s (Connection refused)")
    heard = call([Rank(address, 2, 0), Rank(address, 3, 2)], 0.5)
    assert isinstance(heard[2], UserError) and str(heard[2]) == "process 2 of 3 is not one of process 0's 2"
    assert isinstance(heard[0], TryAgainError) and "1 of 2 processes did not come" in str(heard[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a:1", 2, None), r"--coordinator is given, but not --process_id \(or JAX_PROCESS_ID\); pass all three"),
        (("a", 2, 1), "--coordinator=a: pass HOST:PORT of process 0"),
        (("a:1", 2, 2), "--process_id=2 of --num_processes=2: use 0 to 1"),
    ],
)
def test_who_a_process_is_must_be_said_whole(arguments, words):
    with pytest.raises(UserError, match=words):
        processes.start(*arguments, 1.0)


def test_a_cluster_says_who_a_process_is(monkeypatch):
    """Unless it is told that it is alone."""
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[003-004]", "NTASKS": "4", "PROCID": "3", "LOCALID": "1"}
    assert processes._rank(None, None, None, 1.0) is None
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes._rank(None, None, None, 1.0) == Rank("node003:61447", 4, 3)
    assert processes._rank(None, 1, None, 1.0) is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert processes._rank(None, None, None, 1.0) is None
