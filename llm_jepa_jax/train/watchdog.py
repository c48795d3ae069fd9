# SPDX-License-Identifier: Apache-2.0
"""Notices a step that hangs: where every thread stands then says what it waits for."""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

import jax

from llm_jepa_jax.errors import TRY_AGAIN

LOG = logging.getLogger("llm_jepa_jax")
CHECKS = 20
"""How often it looks within the time that a step may take."""


class Watchdog:
    """Writes the stacks of all threads, once, where one thing takes longer than `seconds`; a context manager. 0: never.

    With `exits` the process then ends with `TRY_AGAIN`, so that a launcher starts the run again: what hangs in a
    collective or a driver cannot be asked to stop. It is off by default, as slow is not dead.
    """

    def __init__(
        self, seconds: float, exits: bool, out: TextIO | None = None, clock: Callable[[], float] | None = None
    ):
        self._seconds, self._exits = seconds, exits
        self._out, self._clock = out or sys.__stderr__, clock or time.monotonic
        self._what: tuple[str, float] | None = None
        self._told: tuple[str, float] | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def now(self, what: str | None) -> None:
        """Says what is being done from now on; None: something that may take any time."""
        self._what = None if what is None else (what, self._clock())

    def look(self) -> bool:
        """Whether what is being done takes too long, and has not been told yet; tells it."""
        what = self._what
        if what is None or what is self._told or self._clock() - what[1] < self._seconds:
            return False
        self._told = what
        LOG.error(
            "%s HANGS: process %d has been at it for %.0f s (train.hang_seconds=%g); where each thread stands:",
            what[0], jax.process_index(), self._clock() - what[1], self._seconds,
        )  # fmt: skip
        if self._out:
            faulthandler.dump_traceback(self._out, all_threads=True)
            self._out.flush()
        return True

    def _watch(self) -> None:
        while not self._end.wait(self._seconds / CHECKS):
            if self.look() and self._exits:
                LOG.error("this process ends with code %d (train.exit_on_hang)", TRY_AGAIN)
                logging.shutdown()
                os._exit(TRY_AGAIN)
