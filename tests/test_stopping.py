# SPDX-License-Identifier: Apache-2.0
"""What stops a run, and what notices that it has stopped by itself."""

import io
import logging
import os
import signal
import tempfile
import threading

import pytest

from llm_jepa_jax.train.metrics import MetricsWriter
from llm_jepa_jax.train.stopping import Stopped, stop_on_sigterm
from llm_jepa_jax.train.stragglers import Arrivals
from llm_jepa_jax.train.watchdog import Watchdog


def test_sigterm_is_taken_any_number_of_times():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.reached()
        stop.leave()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.reached()
        with pytest.raises(Stopped):
            stop.leave()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hung_step_is_told_once_with_the_stacks_of_all_threads(caplog):
    now, leave = [0.0], threading.Event()

    def wait_in_a_thread_of_its_own():
        leave.wait()

    thread = threading.Thread(target=wait_in_a_thread_of_its_own)
    thread.start()
    with tempfile.TemporaryFile("w+") as out:
        watchdog = Watchdog(10.0, False, out, lambda: now[0])
        told = []
        for seconds, what in (
            (0, "step 7"),
            (9, ""),
            (10, ""),
            (25, ""),
            (25, "step 8"),
            (34, ""),
            (50, None),
            (99, ""),
        ):
            now[0] = float(seconds)
            if what != "":
                watchdog.now(what)
            told.append(watchdog.look())
        out.seek(0)
        stacks = out.read()
    leave.set()
    thread.join()
    assert told == [False, False, True, False, False, False, False, False]
    assert "step 7 HANGS: process 0 has been at it for 10 s (train.hang_seconds=10)" in caplog.text
    assert "wait_in_a_thread_of_its_own" in stacks and "test_a_hung_step_is_told_once" in stacks


def test_the_watchdog_is_off_at_zero_seconds():
    with Watchdog(0.0, True, io.StringIO()) as watchdog:
        watchdog.now("step 1")
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_the_last_to_come_is_named():
    arrivals = Arrivals(40, 3, 5.0)
    assert arrivals.see({}, 0.0) is None
    assert arrivals.see({0: "a", 1: "b"}, 100.0) is None
    assert arrivals.see({0: "a", 1: "b"}, 104.9) is None
    assert arrivals.see({0: "a", 1: "b"}, 105.0) == "step 40: 1 of 3 processes have not come for 5 s: 2"
    assert arrivals.see({0: "a", 1: "b"}, 109.0) is None and not arrivals.complete
    assert arrivals.see({0: "a", 1: "b"}, 110.0) == "step 40: 1 of 3 processes have not come for 10 s: 2"
    words = "step 40: process 2 on c came 12.0 s after the first; the others waited"
    assert arrivals.see({0: "a", 1: "b", 2: "c"}, 112.0) == words and arrivals.complete
    quick = Arrivals(50, 2, 5.0)
    assert quick.see({1: "b"}, 0.0) is None and quick.see({0: "a", 1: "b"}, 4.9) is None and quick.complete


def test_metrics_lines_wait_for_a_disk_that_takes_them(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, 0, False)
    writer.write(1, {"a": 1.0})
    path, away = tmp_path / "metrics.jsonl", tmp_path / "away"
    path.rename(away)
    with caplog.at_level(logging.WARNING):
        writer.write(2, {"a": 2.0})
        writer.write(3, {"a": 3.0})
    assert caplog.text.count("cannot be written (No such file or directory); lines are kept until it can") == 1
    with pytest.raises(OSError):
        writer.close()
    away.write_text(away.read_text() + '{"step": 2, "to')  # what a full disk leaves
    away.rename(path)
    writer.write(4, {"a": 4.0})
    writer.close()
    assert path.read_text() == "".join(f'{{"step": {n}, "a": {n}}}\n' for n in (1, 2, 3, 4))
