# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: every process stops at the same step, saves it, and ends as usual."""

import contextlib
import itertools
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """An evaluation was left; the state is saved, and the next start evaluates it."""


class Stop:
    """Whether to stop. All processes ask the same questions in the same order, and get the same answers."""

    def __init__(self) -> None:
        self._requested = False
        self._reached = False
        self._questions = itertools.count(1)

    def request(self) -> None:
        """Asks this process to stop; with others, JAX's own handler of the signal does."""
        self._requested = True

    def reached(self) -> bool:
        """Whether to stop here. To be asked once a step; it costs nothing that can be measured.

        A signal to one of several processes is passed on by JAX's coordination service, which finds the next question
        that none has asked yet.
        """
        if jax.process_count() == 1:
            self._reached |= self._requested
        elif not self._reached:
            self._reached = multihost_utils.reached_preemption_sync_point(next(self._questions))
        return self._reached

    def leave(self) -> None:
        """For where nothing must be saved any more.

        Raises:
            Stopped: it is time to stop.
        """
        if self.reached():
            raise Stopped


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """A SIGTERM within the block asks to stop; more of them change nothing, and do not disturb the last save."""
    stop = Stop()
    if jax.process_count() > 1:  # JAX has installed a handler for all that follows, which must stay
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.request())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
