# SPDX-License-Identifier: Apache-2.0
"""What the campaign counts, and prints at its end."""

import collections
import threading

import pytest

LEDGER = pytest.StashKey()
COLUMNS = ("injected", "survived", "most steps lost", "data lost")


class Ledger:
    """Counts by kind of fault."""

    def __init__(self):
        self._counts = collections.defaultdict(lambda: dict.fromkeys(COLUMNS, 0))
        self._notes, self._lock = [], threading.Lock()

    def add(self, kind, injected=1, survived=1, steps_lost=0, data_lost=0):
        """`data_lost`: runs that ended otherwise than the undisturbed one, or had no checkpoint left to go on from."""
        with self._lock:
            counts = self._counts[kind]
            counts["injected"] += injected
            counts["survived"] += survived
            counts["most steps lost"] = max(counts["most steps lost"], steps_lost)
            counts["data lost"] += data_lost

    def count(self, kind):
        return self._counts[kind]["injected"]

    def note(self, words):
        with self._lock:
            self._notes.append(words)

    def lines(self):
        width = max([len(kind) for kind in self._counts] + [5])
        yield "fault".ljust(width) + "".join(f"{name:>17}" for name in COLUMNS)
        for kind, counts in self._counts.items():
            yield kind.ljust(width) + "".join(f"{counts[name]:>17}" for name in COLUMNS)
        yield from self._notes


@pytest.fixture(scope="session")
def ledger(pytestconfig):
    return pytestconfig.stash.setdefault(LEDGER, Ledger())


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash.get(LEDGER, None)
    if found:
        terminalreporter.section("faults")
        for line in found.lines():
            terminalreporter.write_line(line)
