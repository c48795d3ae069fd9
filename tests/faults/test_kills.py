# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments of start, restore, training and saving."""

import concurrent.futures
import itertools
import re
import time

import numpy as np
import pytest

from tests.faults.runs import EVERY, exit_code, live, outcome, saved_steps

pytestmark = pytest.mark.faults
KILLS = 100
AHEAD = (0, 3)
"""`checkpoint.ahead_steps` of the runs that go on at once."""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """How a run ends that nothing happens to, and the seconds that it takes."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    for _ in range(2):  # the first one compiles; the second finds a finished run and changes nothing
        begun = time.monotonic()
        process = live(workdir, workdir.with_suffix(".log"))
        assert exit_code(process) == 0, workdir.with_suffix(".log").read_text()[-3000:]
    return outcome(workdir), time.monotonic() - begun


def last_training_step(workdir):
    path = workdir / "metrics.jsonl"
    found = re.findall(r'^{"step": (\d+),', path.read_text(), re.MULTILINE) if path.exists() else []
    return int(found[-1]) if found else 0


def kill_until_it_ends(workdir, draw, startup, ahead, ledger):
    """One run. Each start is killed after a random time, while there are kills left, and what it lost is counted."""
    reached, lost = 0, []
    for life in itertools.count():
        log = workdir.with_name(f"{workdir.name}-{life}.log")
        log.touch()  # a process may not live to do so
        process = live(workdir, log, f"--config.checkpoint.ahead_steps={ahead}")
        kill = ledger.count("SIGKILL") < KILLS
        code = exit_code(process, draw.uniform(0.0, startup + 5.0) if kill else None)
        if code is None:
            process.kill()
            code = exit_code(process)
            ledger.add("SIGKILL")
        begun = re.search(r"starting from (checkpoint (\d+)|random)", log.read_text())
        if begun:
            restored = int(begun[2] or 0)
            lost.append(reached - restored)
            assert lost[-1] <= EVERY + ahead, (reached, restored)
            reached = restored
        reached = max(reached, last_training_step(workdir))
        if code == 0:
            return lost
        assert code == -9, log.read_text()[-3000:]


def test_a_hundred_kills_change_nothing_and_lose_no_more_than_is_promised(undisturbed, tmp_path, ledger):
    expected, startup = undisturbed

    def runs(worker):
        draw, lost = np.random.default_rng([int(time.time()), worker]), []
        for number in itertools.count():
            if ledger.count("SIGKILL") >= KILLS:
                return lost
            workdir = tmp_path / f"run-{worker}-{number}"
            lost += kill_until_it_ends(workdir, draw, startup, AHEAD[worker], ledger)
            same = outcome(workdir) == expected
            ledger.add("SIGKILL", injected=0, survived=0, data_lost=not same, steps_lost=max(lost))
            assert same and len(saved_steps(workdir)) <= 3

    with concurrent.futures.ThreadPoolExecutor(len(AHEAD)) as pool:
        for ahead, lost in zip(AHEAD, pool.map(runs, range(len(AHEAD))), strict=True):
            ledger.note(
                f"SIGKILL: {sum(lost)} steps done again in {len(lost)} restores, {np.mean(lost):.1f} each and "
                f"{max(lost)} at most; promised are {EVERY} + {ahead}"
            )
