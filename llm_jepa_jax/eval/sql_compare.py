# SPDX-License-Identifier: Apache-2.0
"""Are two results the same? In order where the query asks for one, else as bags of rows."""

import collections
import contextlib
import re
import sqlite3
from collections.abc import Sequence
from typing import Any

Rows = Sequence[tuple[Any, ...]]
TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `(?:[^`]|``)*` | \[[^\]]*\] | --[^\n]* | /\*.*?(?:\*/|$) | \w+ | [()]""",
    re.VERBOSE | re.DOTALL,
)
DIGITS = 10
"""Significant digits in which real numbers are compared: sums depend on the order of their parts in the last ones."""


def has_order(query: str) -> bool:
    """Whether a query as a whole, not a part in parentheses, says ORDER BY."""
    depth, before = 0, ""
    for token in TOKEN.findall(query):
        if token in "()":
            depth += 1 if token == "(" else -1
        elif token.startswith(("--", "/*")):
            continue
        elif depth == 0 and before == "ORDER" and token.upper() == "BY":
            return True
        before = token.upper()
    return False


def same_rows(found: Rows, wanted: Rows, ordered: bool) -> bool:
    """Equal rows with equal columns in their order; integers equal real numbers, text equals neither."""
    one, other = ([tuple(map(_rounded, row)) for row in rows] for rows in (found, wanted))
    return one == other if ordered else collections.Counter(one) == collections.Counter(other)


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def shell_text(rows: Rows) -> str:
    """Rows as the `sqlite3` shell prints them: what the published script compares."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        return "".join("|".join(_shown(value, connection) for value in row) + "\n" for row in rows)


def _shown(value: Any, connection: sqlite3.Connection) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.split(b"\0")[0].decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return value.split("\0")[0]
    return connection.execute("SELECT CAST(? AS TEXT)", (value,)).fetchone()[0]
