# SPDX-License-Identifier: Apache-2.0
"""Names the process that the others wait for: once a log period each says that it is about to start a step.

They say so through JAX's coordination service, and nobody waits for it: process 0 looks on from a thread of its own.
"""

import logging
import socket
import threading
import time

import jax

LOG = logging.getLogger("llm_jepa_jax")
LOOK_SECONDS = 0.25
SHOWN = 4
"""How many processes a warning names."""


class Arrivals:
    """When the processes came to one step."""

    def __init__(self, step: int, count: int, seconds: float):
        self._step, self._count, self._seconds = step, count, seconds
        self._hosts: dict[int, str] = {}
        self._first = self._last = 0.0
        self.fresh = True
        """Nobody has looked yet."""
        self._told = seconds
        """The wait, in seconds, from which those missing are told next."""

    def see(self, hosts: dict[int, str], now: float) -> str | None:
        """Takes the host names of all that have come so far; what there is to say about it, if anything."""
        self.fresh = False
        if not self._hosts and hosts:
            self._first = now
        new = [index for index in hosts if index not in self._hosts]
        self._hosts |= hosts
        if new:
            self._last = now
        late = now - self._first
        if new and self.complete and self._last - self._first >= self._seconds:
            names = ", ".join(f"process {i} on {self._hosts[i]}" for i in sorted(new)[:SHOWN])
            return f"step {self._step}: {names} came {late:.1f} s after the first; the others waited"
        if self._hosts and not self.complete and late >= self._told:
            self._told = 2 * late
            missing = [index for index in range(self._count) if index not in self._hosts]
            names = ", ".join(map(str, missing[:SHOWN])) + (", …" if len(missing) > SHOWN else "")
            return (
                f"step {self._step}: {len(missing)} of {self._count} processes have not come for {late:.0f} s: {names}"
            )
        return None

    @property
    def complete(self) -> bool:
        return len(self._hosts) == self._count


class Stragglers:
    """Watches steps `first`, `first + every`, …: a context manager. Alone, or with 0 seconds, it does nothing."""

    def __init__(self, first: int, every: int, seconds: float):
        self._first, self._every, self._seconds = first, every, seconds
        self._on = seconds > 0 and jax.process_count() > 1
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stragglers", daemon=True)
        if self._on:
            from jax._src.distributed import global_state  # it has no public name

            self._client = global_state.client

    def __enter__(self) -> "Stragglers":
        if self._on and jax.process_index() == 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def here(self, step: int) -> None:
        """This process has its rows and starts the step."""
        if self._on and step >= self._first and (step - self._first) % self._every == 0:
            self._client.key_value_set(f"{_place(step)}/{jax.process_index()}", socket.gethostname(), True)

    def _watch(self) -> None:
        step, arrivals = self._first, Arrivals(self._first, jax.process_count(), self._seconds)
        while not self._end.wait(0.0 if arrivals.fresh else LOOK_SECONDS):
            try:
                found = self._client.key_value_dir_get(_place(step))
            except jax.errors.JaxRuntimeError:  # none has come; if the service is gone, JAX ends the process
                found = []
            hosts = {int(key.rpartition("/")[2]): host for key, host in found}
            words = arrivals.see(hosts, time.monotonic())
            if words:
                LOG.warning(words)
            if arrivals.complete:
                self._client.key_value_delete(f"{_place(step)}/")
                step += self._every
                arrivals = Arrivals(step, jax.process_count(), self._seconds)


def _place(step: int) -> str:
    return f"llm_jepa_jax/came/{step}"
