# SPDX-License-Identifier: Apache-2.0
"""Tiny runs in processes of their own, and how they ended."""

import json
import multiprocessing
import multiprocessing.connection
import os
import re
import socket
import subprocess
import sys
import threading
import time

from tests.conftest import CACHE, REPOSITORY

EVERY = 10
"""Steps between two saves."""
NUM_STEPS = 240
ARGUMENTS = [
    f"--config={REPOSITORY}/configs/tiny.py:smoke", f"--config.train.compile_cache={CACHE}",
    f"--config.train.num_steps={NUM_STEPS}", f"--config.checkpoint.every_steps={EVERY}", "--config.log.every_steps=1",
    "--config.log.report=False", "--config.log.tensorboard=False", "--config.eval.final_examples=2",
    "--config.eval.max_new_tokens=2", "--config.data.row_length=128", "--config.data.rows_per_step=8",
    "--config.data.max_dropped_share=1", "--config.model.embed_dim=32", "--config.model.mlp_dim=64",
    "--config.checkpoint.retry_seconds=30", "--config.opt.schedule=constant",
]  # fmt: skip
TIMED = ("tokens_per_s", "examples_per_s", "data_wait_share")
SECONDS = 300


def environment(devices=1):
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags += f" --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}


def start(workdir, *arguments, devices=1, rank=None, extra=None, preexec=None):
    """One process; its words go to `workdir`'s log file."""
    ranks = dict(zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), map(str, rank or ()), strict=False))
    env = environment(devices) | {f"JAX_{name}": value for name, value in ranks.items()} | (extra or {})
    with log_of(workdir, rank[2] if rank else 0).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "llm_jepa_jax.main", *ARGUMENTS, *arguments, f"--workdir={workdir}"],
            cwd=REPOSITORY, env=env, stdout=log, stderr=log, preexec_fn=preexec,
        )  # fmt: skip


def start_many(workdir, count, *arguments, devices=1):
    """Several that run as one."""
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    ranks = [(f"localhost:{port}", count, index) for index in range(count)]
    return [start(workdir, *arguments, devices=devices, rank=rank) for rank in ranks]


def log_of(workdir, index=0):
    return workdir.with_name(f"{workdir.name}-{index}.log")


def last_step(workdir):
    """The last step that the metrics show."""
    path = workdir / "metrics.jsonl"
    found = re.findall(r'^{"step": (\d+),', path.read_text(), re.MULTILINE) if path.exists() else []
    return int(found[-1]) if found else 0


def wait(until, process=None):
    """Returns once `until()` holds."""
    deadline = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < deadline, "it did not come to that"
        assert process is None or process.poll() is None, f"the run has ended with {process.returncode}"
        time.sleep(0.02)


def end(process):
    """The exit code of a run that ends in time."""
    try:
        return process.wait(timeout=SECONDS)
    finally:
        process.kill()


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def outcome(workdir, step=NUM_STEPS):
    """The checksums of everything at the last step, and the metrics lines without what depends on the clock."""
    meta = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return meta["content"]["arrays"], [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def _life(arguments, log):
    """A run in a process that has imported everything already."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    os.environ.update(environment())
    sys.argv = ["main", *arguments]
    from llm_jepa_jax.main import main

    main()


LIVES = multiprocessing.get_context("forkserver")
LIVES.set_forkserver_preload(["llm_jepa_jax.modes", "llm_jepa_jax.verify", "llm_jepa_jax.publish"])


EXIT_CODES = threading.Lock()
"""An exit code can be read once, and whoever starts a process asks all others for theirs."""


def live(workdir, log, *arguments):
    """Starts a run in a fraction of the time of `start`."""
    process = LIVES.Process(target=_life, args=([*ARGUMENTS, *arguments, f"--workdir={workdir}"], str(log)))
    with EXIT_CODES:
        process.start()
    return process


def exit_code(process, seconds=None):
    """That of a life, once it has ended; None: it goes on after so many seconds."""
    multiprocessing.connection.wait([process.sentinel], seconds)
    with EXIT_CODES:
        return process.exitcode
