# SPDX-License-Identifier: Apache-2.0
"""How much a run has at stake at any time, and what a restart still has to do."""

import asyncio
import json
import os
import signal
import threading

import pytest
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

from llm_jepa_jax.checkpoint.manager import Checkpoints, saved_steps
from llm_jepa_jax.main import run
from llm_jepa_jax.train.loop import Recorder
from llm_jepa_jax.train.progress import Bar
from tests.test_initial import QUICK

EVERY = 2


@pytest.mark.parametrize("ahead", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_more_than_a_period_is_ever_at_stake(tmp_path, monkeypatch, ahead):
    """With a disk so slow that nothing is on it before somebody waits for it."""
    waited, finalize, settle, push = (
        threading.Event(), AtomicRenameTemporaryPath.finalize, Checkpoints.settle, Recorder.push
    )  # fmt: skip
    at_stake = []

    async def finalize_when_waited_for(path):
        await asyncio.to_thread(waited.wait)
        await finalize(path)

    def settle_at_last(checkpoints):
        waited.set()
        settle(checkpoints)
        waited.clear()

    def count(recorder, step, *rest):
        at_stake.append(step - max(saved_steps(tmp_path / "checkpoints"), default=0))
        push(recorder, step, *rest)

    monkeypatch.setattr(AtomicRenameTemporaryPath, "finalize", finalize_when_waited_for)
    monkeypatch.setattr(Checkpoints, "settle", settle_at_last)
    monkeypatch.setattr(Recorder, "push", count)
    periods = [f"--config.checkpoint.every_steps={EVERY}", f"--config.checkpoint.ahead_steps={ahead}"]
    run([*QUICK, "--config.train.num_steps=7", "--config.eval.final_examples=1", *periods, f"--workdir={tmp_path}"])
    assert len(at_stake) == 7 and max(at_stake) == EVERY + ahead, at_stake


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_an_evaluation_that_a_signal_ends_is_done_by_the_next_start(tmp_path, monkeypatch):
    """The state is on disk before; neither scores nor answers are, after; and nothing is trained again."""
    argv = [*QUICK, "--config.eval.final_examples=9", "--config.eval.batch_size=8", "--config.log.every_steps=1"]
    argv += [f"--workdir={tmp_path}"]
    update, shown = Bar.update, []

    def signalled(bar, done, text=None):
        update(bar, done, text)
        if bar._what == "evaluate":
            shown.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Bar, "update", signalled)
        stopped = run(argv)
    assert shown == [8], "left at the first chance"
    assert stopped["step"] == 2 and "exact_match" not in stopped and saved_steps(tmp_path / "checkpoints") == [2]
    before = lines_of(tmp_path)
    assert [line["step"] for line in before] == [1, 2] and not (tmp_path / "eval").exists()
    assert "exact_match" in run(argv)
    assert lines_of(tmp_path)[:2] == before and "exact_match" in lines_of(tmp_path)[2] and len(lines_of(tmp_path)) == 3
    assert len((tmp_path / "eval" / "exact_match-2.jsonl").read_text().splitlines()) == 9
