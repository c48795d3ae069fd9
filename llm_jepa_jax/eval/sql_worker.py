# SPDX-License-Identifier: Apache-2.0
"""The process in which a query that nobody has read runs: started by `sql_sandbox`, with the standard library alone.

It says `{}` when it is ready, reads one JSON request a line, `{"database", "query", "seconds", "rows", "bytes"}`, and
answers each with a line: `{"rows": [[…], …]}`, or `{"error", "limit"}`. A value that JSON has not is `{"blob": hex}` or
`{"real": text}`. A query gets a connection of its own that can only read one file; what it may do is a list of what is
allowed, not of what is not.
"""

import json
import math
import os
import resource
import sqlite3
import sys
import time
import urllib.parse
from collections.abc import Callable

READS = ("sqlite_master", "sqlite_schema")
ALLOWED_FUNCTIONS = """
    abs avg ceil ceiling char coalesce concat concat_ws count cume_dist current_date current_time
    current_timestamp date datetime degrees dense_rank exp first_value floor format glob group_concat hex if ifnull iif
    instr julianday lag last_value lead length like ln log log10 log2 lower ltrim max median min mod nth_value ntile
    nullif octet_length percent_rank pi pow power printf quote radians rank replace round row_number rtrim sign sqrt
    strftime string_agg substr substring sum time timediff total trim trunc typeof unicode unixepoch upper
    acos asin atan atan2 cos sin tan -> ->> json_extract json_array_length
"""
FUNCTIONS = frozenset(ALLOWED_FUNCTIONS.split())
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 20_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 500,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 50_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 50,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
ADDRESS_SPACE = 1 << 30
"""Bytes of the whole process."""
HEAP = 256 << 20
"""Bytes that SQLite may hold."""
PROGRESS = 2000
"""Virtual-machine steps between two looks at the clock."""


class Refused(Exception):
    """The query is not one that runs here, or its result is too large."""


def lock_down() -> None:
    """Limits of the process, as far as the system has them: no file may grow, nothing may be started."""
    limits = {
        "RLIMIT_AS": ADDRESS_SPACE, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 32,
        "RLIMIT_MEMLOCK": 0,
    }  # fmt: skip
    for name, most in limits.items():
        number = getattr(resource, name, None)
        if number is not None:
            try:
                resource.setrlimit(number, (most, most))
            except (OSError, ValueError):
                continue  # macOS has some of them in name only; the parent kills what runs away


def allow_seconds(seconds: float) -> None:
    """Processor time for one more query; the system kills the process behind it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def authorizer(tables: frozenset[str]) -> Callable[[int, str | None, str | None, str | None, str | None], int]:
    """Allows SELECT, columns of the file's own tables, and known functions."""
    always = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)

    def allowed(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
        if action in always:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            # A table of which no column is read, as in count(*), comes with no column and no database.
            nothing_read = not second and not database
            own = database == "main" and (first or "").lower() in tables
            return sqlite3.SQLITE_OK if own or nothing_read else sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    return allowed


def connect(path: str, seconds: float) -> sqlite3.Connection:
    """A connection that can read this file until the time is up, and nothing else."""
    uri = "file:" + urllib.parse.quote(os.path.abspath(path)) + "?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    for pragma in ("query_only=1", "trusted_schema=0", "temp_store=2", "mmap_size=0", f"hard_heap_limit={HEAP}"):
        connection.execute(f"PRAGMA {pragma}").close()
    names = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall()
    for limit, most in LIMITS.items():
        connection.setlimit(limit, most)
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > deadline, PROGRESS)
    connection.set_authorizer(authorizer(frozenset(READS) | {name.lower() for (name,) in names}))
    return connection


def answer(request: dict) -> dict:
    """The rows of a query, or why there are none."""
    allow_seconds(request["seconds"])
    connection = connect(request["database"], request["seconds"])
    try:
        return {"rows": rows_of(connection, request)}
    except (sqlite3.Error, sqlite3.Warning, Refused, ValueError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
            return {"error": f"ran longer than {request['seconds']:g} s", "limit": True}
        large = isinstance(error, Refused) and error.args[1:] == (True,)
        return {"error": str(error)[:200], "limit": large}
    except MemoryError:
        return {"error": "needs too much memory", "limit": True}
    finally:
        connection.close()


def rows_of(connection: sqlite3.Connection, request: dict) -> list:
    """All rows of the one statement of a query."""
    cursor = connection.execute(request["query"])
    if cursor.description is None:
        raise Refused("no statement that gives rows")
    rows: list = []
    size = 0
    for row in cursor:
        values = [plain(value) for value in row]
        size += sum(len(str(value)) for value in values) + 2 * len(values)
        if len(rows) >= request["rows"] or size > request["bytes"]:
            raise Refused(f"the result has more than {request['rows']} rows or {request['bytes']} bytes", True)
        rows.append(values)
    return rows


def plain(value: object) -> object:
    """A value as JSON has it."""
    if isinstance(value, bytes):
        return {"blob": value.hex()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"real": str(value)}
    return value


def main() -> None:
    """Says that it is ready, then answers until the input ends."""
    lock_down()
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except sqlite3.Error as error:
            reply = {"error": f"cannot read the database: {error}", "limit": False}
        except MemoryError:
            reply = {"error": "needs too much memory", "limit": True}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
