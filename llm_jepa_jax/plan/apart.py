# SPDX-License-Identifier: Apache-2.0
"""Work in a process of its own, for compilers that end the process when they meet what they did not expect."""

import multiprocessing
import os
import pathlib
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Result = TypeVar("Result")
FATAL = ("F0", "F1")
"""How the line begins that a compiler leaves when it gives up: its letter, and the month."""
SHOWN = 300
"""Letters of it."""


class Died(Exception):
    """The process ended without a result; its words say how."""


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """What the function returns or raises, computed in another process; all of it must pickle.

    Raises:
        Died: that process ended before the function did.
    """
    context = multiprocessing.get_context("spawn")  # a copy of this process might hold locks of its threads
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:
        words = pathlib.Path(directory, "stderr")
        process = context.Process(target=_call, args=(theirs, words, function, arguments))
        process.start()
        theirs.close()
        try:
            result, error = ours.recv()
        except EOFError:
            process.join()
            raise Died(_ending(process.exitcode or 0, words)) from None
        process.join()
    if error is not None:
        raise error
    return result


def _call(answer: Connection, words: pathlib.Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The other process: its standard error goes to a file."""
    os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT), 2)
    result = error = None
    try:
        result = function(*arguments)
    except Exception as raised:
        error = raised
    answer.send((result, error))


def _ending(code: int, words: pathlib.Path) -> str:
    """How a process ended: the signal or the code, and its fatal line, or its last one where it left none."""
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    lines = words.read_text(errors="replace").splitlines() if words.exists() else []
    fatal = next((line.partition("] ")[2] for line in lines if line.startswith(FATAL)), lines[-1] if lines else "")
    return f"{how}: {fatal[:SHOWN].strip()}" if fatal else how
