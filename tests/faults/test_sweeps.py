# SPDX-License-Identifier: Apache-2.0
"""A sweep that is killed at random, with its runs or without them, ends with the table of one that was left alone."""

import contextlib
import os
import random
import signal
import subprocess

import pytest

from tests.faults.runs import wait
from tests.sweeps import NTP, TINY, write_records
from tests.test_sweep_runs import K, runs_of, start

pytestmark = pytest.mark.faults
KILLS = 10
OUTPUTS = ("table.md", "table.csv")


def test_a_sweep_killed_at_random_ends_with_the_same_table(tmp_path, ledger):
    records = write_records(tmp_path / "test.jsonl")
    flags = [*TINY, f"--grid={K}=1,11", "--seeds=82", f"--test={records}", f"--baseline={NTP}", "--variant=JEPA:"]
    flags += ["--equal-compute", "--config.data.layout=shared", "--jobs=2"]
    flags += ["--config.train.num_steps=200", "--config.checkpoint.every_steps=20"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert start(calm, *flags).wait(timeout=900) == 1  # k = 11 cannot be
    rng, kills, alone = random.Random(0), 0, 0
    while kills < KILLS:
        process = start(killed, *flags)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0.5, 12))
        assert process.poll() is None, f"it ended after {kills} kills: longer runs are wanted"
        with_runs = rng.random() < 0.7
        process.send_signal(signal.SIGKILL)
        process.wait()
        for pid in runs_of(killed) if with_runs else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        kills, alone = kills + 1, alone + (not with_runs and bool(runs_of(killed)))
    assert start(killed, *flags).wait(timeout=900) == 1
    wait(lambda: not runs_of(killed))
    for name in OUTPUTS:
        assert (killed / name).read_text() == (calm / name).read_text(), name
    ledger.add("SIGKILL of a sweep", injected=kills, survived=kills)
    ledger.note(f"SIGKILL of a sweep: {alone} times its runs went on without it")
