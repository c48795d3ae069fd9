# SPDX-License-Identifier: Apache-2.0
"""Several processes: one is told to stop, one dies, and others go on in another number."""

import json
import os
import re
import signal
import time

import pytest

from tests.faults.runs import EVERY, last_step, log_of, saved_steps, start, start_many, wait

pytestmark = pytest.mark.faults
WHOLE = ("--config.data.rows_per_step=8", "--config.mesh.fsdp=-1", "--config.mesh.data=1")
MINUTE = 60.0


def end(processes, seconds=MINUTE):
    """Exit codes, and how long they took."""
    begun = time.monotonic()
    try:
        codes = [process.wait(timeout=max(1.0, seconds - (time.monotonic() - begun))) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, time.monotonic() - begun


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["total_loss"] for line in lines if "total_loss" in line}


def run_to(workdir, steps, count, devices):
    arguments = [*WHOLE, f"--config.train.num_steps={steps}", "--config.checkpoint.every_steps=2"]
    processes = (
        [start(workdir, *arguments, devices=devices)]
        if count == 1
        else start_many(workdir, count, *arguments, devices=devices)
    )
    codes, _ = end(processes, 300)
    assert codes == [0] * count, log_of(workdir).read_text()[-3000:]


def test_two_are_told_to_stop_by_one_signal_and_die_by_another(tmp_path, ledger):
    """A pause is told. SIGTERM to one, twice: both save the same step and exit with 0. kill -9: the other ends."""
    workdir = tmp_path / "run"
    watched = ("--config.log.straggler_seconds=1", "--config.train.hang_seconds=2")
    processes = start_many(workdir, 2, *WHOLE, *watched)
    wait(lambda: last_step(workdir) > EVERY, processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    wait(lambda: "HANGS: process 0 has been at it for 2 s" in log_of(workdir).read_text(), processes[0])
    # Inside a step nobody can know who is late; before one, the other has said so for a second by now.
    missed = re.search(r"1 of 2 processes have not come for \d+ s: 1", log_of(workdir).read_text())
    processes[1].send_signal(signal.SIGCONT)
    if missed:
        wait(
            lambda: re.search("process 1 on .* after the first; the others", log_of(workdir).read_text()), processes[0]
        )
    assert "in push" in log_of(workdir).read_text(), "where the main thread stands"
    ledger.add("pause of one of two")
    ledger.note(f"pause of one of two: {'before a step, and missed by name' if missed else 'inside a step'}")
    for _ in range(2):
        os.kill(processes[1].pid, signal.SIGTERM)
    codes, seconds = end(processes)
    step = last_step(workdir)
    assert codes == [0, 0] and saved_steps(workdir)[-1] == step, log_of(workdir).read_text()[-3000:]
    assert f"the state is saved at step {step}; the same command goes on" in log_of(workdir).read_text()
    ledger.add("SIGTERM to one of two")
    ledger.note(f"SIGTERM to one of two: both saved step {step} and ended within {seconds:.1f} s")

    processes = start_many(workdir, 2, *WHOLE)
    wait(lambda: last_step(workdir) > step + EVERY, processes[0])
    processes[1].kill()
    (code, _), seconds = end(processes)
    words = log_of(workdir).read_text()
    assert code not in (0, 2), "a launcher must start it again"
    assert "another one is gone" in words or "another task died" in words, words[-3000:]
    reached, newest = last_step(workdir), saved_steps(workdir)[-1]
    ledger.note(f"SIGKILL of one of two: the other ended with code {code} within {seconds:.1f} s")
    processes = start_many(workdir, 2, *WHOLE, f"--config.train.num_steps={reached + 2}")
    codes, _ = end(processes, 300)
    assert codes == [0, 0] and f"starting from checkpoint {newest}" in log_of(workdir).read_text()
    ledger.add("SIGKILL of one of two", steps_lost=reached - newest)


def test_four_then_one_then_two_processes_train_as_one(tmp_path, ledger):
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    run_to(alone, 12, 1, 4)
    for steps, count, devices in ((4, 4, 1), (8, 1, 8), (12, 2, 1)):
        run_to(moved, steps, count, devices)
    expected, found = losses(alone), losses(moved)
    assert list(found) == list(expected) == list(range(1, 13))
    for step, value in expected.items():
        assert found[step] == pytest.approx(value, rel=1e-5), step
    ledger.add("other number of processes", injected=2, survived=2)
    ledger.note(f"4, then 1, then 2 processes: last loss {found[12]:.6f}, {expected[12]:.6f} by one process")
