# SPDX-License-Identifier: Apache-2.0
"""Runs queries that a model wrote, each in a process that can only read one file and is killed when it does not answer.

What a query may do is decided in `sql_worker`; here is what happens when that does not hold it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import selectors
import subprocess
import sys
import time
from typing import Any

from llm_jepa_jax.eval import sql_worker

START_SECONDS = 60.0
GRACE_SECONDS = 3.0
"""Behind a query's time, after which its process is killed. Its own clock should have stopped it before."""
MOST_ROWS = 100_000
MOST_BYTES = 8 << 20
MOST_REPLY = 8 * MOST_BYTES
"""Bytes of a reply; JSON spells a byte with up to six."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a query gave."""

    rows: list[tuple[Any, ...]] | None
    """None, bool-free SQLite values: int, float, str, bytes; None where there is no result."""
    error: str = ""
    limit: bool = False
    """A limit of time, memory or size is why there is no result."""


class WorkerLost(Exception):  # noqa: N818
    """The process died or was late. Its text says which."""


class Worker:
    """One process, asked one query at a time."""

    def __init__(self) -> None:
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", sql_worker.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=kept, cwd="/", start_new_session=True,
        )  # fmt: skip
        self._left = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        try:
            self._reply(START_SECONDS)
        except WorkerLost as lost:
            self.kill()
            raise RuntimeError(f"the process that runs queries does not start: {lost}") from lost

    @property
    def _out(self) -> int:
        assert self._process.stdout
        return self._process.stdout.fileno()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to one request.

        Raises:
            WorkerLost: there is none after so many seconds, or the process is gone; it is of no more use.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerLost("its process is gone") from error
        return self._reply(seconds)

    def _reply(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._left:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise WorkerLost("did not answer in time")
            read = os.read(self._out, 1 << 16)
            self._left += read
            if not read:
                raise WorkerLost("its process died")
            if len(self._left) > MOST_REPLY:
                raise WorkerLost("its reply is too large")
        line, self._left = self._left.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with contextlib.suppress(OSError):
                pipe.close()


class Sandbox:
    """A few processes for queries, a context manager; `run` may be called from as many threads."""

    def __init__(self, seconds: float, size: int = 1):
        self._seconds = seconds
        self._workers: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        self._size = size
        for _ in range(size):
            self._workers.put(None)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *why: object) -> None:
        for _ in range(self._size):
            worker = self._workers.get()
            if worker:
                worker.kill()

    def run(self, database: pathlib.Path, query: str) -> Result:
        """The rows of one SELECT over one file, or why there are none; at most `seconds` and some grace later."""
        worker = self._workers.get()
        try:
            worker = worker or Worker()
            request = {
                "database": str(database.absolute()), "query": query, "seconds": self._seconds, "rows": MOST_ROWS,
                "bytes": MOST_BYTES,
            }  # fmt: skip
            reply = worker.ask(request, self._seconds + GRACE_SECONDS)
        except WorkerLost as lost:
            assert worker
            worker.kill()
            worker = None
            return Result(None, str(lost), limit=True)
        finally:
            self._workers.put(worker)
        if "error" in reply:
            return Result(None, reply["error"], reply["limit"])
        return Result([tuple(_value(value) for value in row) for row in reply["rows"]])


def _value(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return bytes.fromhex(value["blob"]) if "blob" in value else float(value["real"])
