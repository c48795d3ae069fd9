# SPDX-License-Identifier: Apache-2.0
"""Runs points as processes of the real command line: several at a time, none twice, each failure its own."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import IO

from llm_jepa_jax.errors import TRY_AGAIN
from llm_jepa_jax.sweep import results
from llm_jepa_jax.sweep.devices import Devices
from llm_jepa_jax.sweep.points import Point, command
from llm_jepa_jax.sweep.results import DONE, FAILED, Outcome
from llm_jepa_jax.train.progress import Bar

LOG = logging.getLogger("llm_jepa_jax")
POLL_SECONDS = 0.2
ERROR_LETTERS = 400
"""Of a failed point's last line, in tables."""


@dataclasses.dataclass
class Job:
    """A point whose process runs."""

    point: Point
    process: subprocess.Popen
    trains: bool
    """It does not evaluate on test records."""
    slot: int
    start: float
    log_from: int
    """Where in the log this process begins."""
    asked: int = 0
    """How often it has been asked to end."""


class Stop:
    """What Ctrl-C and SIGTERM ask for: once, that runs save and end; twice, that they end at once."""

    def __init__(self) -> None:
        self.asked = 0

    @contextlib.contextmanager
    def handlers(self) -> Iterator[None]:
        def ask(*_: object) -> None:
            self.asked += 1

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Runner:
    """Points on their way to being done."""

    def __init__(self, points: Sequence[Point], jobs: int, devices: Devices, retries: int, metric: str):
        self._metric, self._jobs, self._devices, self._retries = metric, jobs, devices, retries
        self._waiting = list(points)
        self._running: list[Job] = []
        self._attempts: dict[str, int] = {}
        self._prepared: set[str] = set()
        self._elsewhere: set[str] = set()
        self._ended: list[Outcome] = []
        self._stop = Stop()

    def run(self) -> bool:
        """Until all have ended; False: it was asked to stop before."""
        done = [each for each in self._waiting if results.read(each).state == DONE]
        self._waiting = [each for each in self._waiting if each not in done]
        total = len(done) + len(self._waiting)
        LOG.info("%d of %d points are done", len(done), total)
        with self._stop.handlers(), Bar("sweep", total, len(done)) as bar:
            while (self._waiting and not self._stop.asked) or self._running:
                if not self._stop.asked:
                    self._start_some()
                time.sleep(POLL_SECONDS)
                self._collect()
                bar.update(len(done) + len(self._ended), self._text())
        return not self._stop.asked

    def _text(self) -> str:
        failed = sum(outcome.state == FAILED for outcome in self._ended)
        words = [f"{failed} failed"] if failed else []
        return ", ".join([*words, f"{len(self._running)} running"])

    def _start_some(self) -> None:
        """Fills free slots. One point at a time prepares data that others share."""
        for point in list(self._waiting):
            free = sorted(set(range(self._jobs)) - {job.slot for job in self._running})
            if not free:
                return
            if point.data_key not in self._prepared and any(j.point.data_key == point.data_key for j in self._running):
                continue
            try:
                self._start(point, free[0])
            except BlockingIOError:  # an earlier start of this sweep left it running, or another has it
                if point.name not in self._elsewhere:
                    LOG.info("%s: runs in another process; it is waited for", point.name)
                self._elsewhere.add(point.name)

    def _start(self, point: Point, slot: int) -> None:
        """Raises BlockingIOError: another process has the point."""
        with _locked(point) as lock:
            results.forget_failure(point)
            outcome = results.read(point)
            self._waiting.remove(point)
            if outcome.state == DONE:  # that other process has ended well
                self._ended.append(outcome)
                return
            arguments = point.test_arguments if outcome.result else point.arguments
            point.log.parent.mkdir(parents=True, exist_ok=True)
            with point.log.open("ab") as log:
                log.write(f"+ {shlex.join(command(arguments))}\n".encode("utf-8", "surrogateescape"))
                log.flush()
                # In a session of its own, so that Ctrl-C comes here alone; the lock lives as long as the process.
                process = subprocess.Popen(
                    command(arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    pass_fds=[lock.fileno()], env=os.environ | self._devices.environment(slot, self._jobs),
                )  # fmt: skip
                self._running.append(Job(point, process, not outcome.result, slot, time.monotonic(), log.tell()))

    def _collect(self) -> None:
        for job in list(self._running):
            if self._stop.asked > job.asked and job.process.poll() is None:
                job.asked = self._stop.asked
                _end(job.process, job.asked > 1)
            if job.process.poll() is None:
                if job.point.data_key not in self._prepared and _has_data(job.point):
                    self._prepared.add(job.point.data_key)
                continue
            self._running.remove(job)
            self._after(job)

    def _after(self, job: Job) -> None:
        """A process has ended: its point is done, goes on, is tried again, or has failed."""
        point, code = job.point, job.process.returncode
        outcome = results.read(point)
        if outcome.state == DONE:
            self._ended.append(outcome)
            score = results.value(outcome.result, self._metric)
            words = "" if score is None else f"{self._metric} {score:.4g} "
            LOG.info("%s: %s(%.0f s)", point.name, words, time.monotonic() - job.start)
            return
        if self._stop.asked:
            return
        if code == 0 and outcome.state == results.TRAINED and job.trains:
            self._waiting.insert(0, point)  # its test evaluation is next
            return
        error = _last_line(job)
        self._attempts[point.name] = self._attempts.get(point.name, 0) + 1
        if (code in (0, TRY_AGAIN) or code < 0) and self._attempts[point.name] <= self._retries:
            LOG.warning("%s: %s; it is tried again", point.name, _ending(code, error))
            self._waiting.append(point)
            return
        results.record_failure(point, code, _ending(code, error))
        self._ended.append(results.read(point))
        LOG.warning("%s: FAILED: %s; see %s", point.name, _ending(code, error), point.log)


@contextlib.contextmanager
def _locked(point: Point) -> Iterator[IO]:
    """This process's claim on a point, and that of whatever process inherits it.

    Raises BlockingIOError: another has it.
    """
    directory = point.directory / "locks"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / point.name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock


def _end(process: subprocess.Popen, at_once: bool) -> None:
    """Asks a run to save and end; or ends it and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        if at_once:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.terminate()


def _has_data(point: Point) -> bool:
    """Its tokenizer and tokenised records are in the cache."""
    try:
        return "prepare data" in json.loads((point.workdir / "phases.json").read_text())
    except (OSError, ValueError):
        return False


def _last_line(job: Job) -> str:
    """The last words of a process."""
    with job.point.log.open("rb") as log:
        log.seek(job.log_from)
        lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:ERROR_LETTERS]


def _ending(code: int, error: str) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (f" after: {error}" if error else "")
    if code == 0:
        return "it was asked to stop before its end"
    return error or f"exit code {code}"
