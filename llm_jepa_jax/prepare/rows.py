# SPDX-License-Identifier: Apache-2.0
"""Rows of text files: JSON lines, JSON lists, comma- or tab-separated values, and parallel files."""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any, Literal

from llm_jepa_jax.data.sources import UTF8_MARK
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.source_files import SourceFile, decoded

FIELD_BYTES = 1 << 24
"""Longest field of a CSV file."""


def json_lines(file: SourceFile) -> Iterator[tuple[str, Any]]:
    """(`file:line`, value) of every line that is not blank.

    Raises:
        UserError: a line is not JSON.
    """
    for where, line in file.lines():
        if line.strip():
            yield where, _json(line.removeprefix("\ufeff"), where)


def json_list(file: SourceFile) -> Iterator[tuple[str, Any]]:
    """(`file: entry N`, value) of a file that holds one list, N from 1.

    Raises:
        UserError: it does not.
    """
    with file.opened() as opened:
        data = opened.read()
    values = _json(decoded(data.removeprefix(UTF8_MARK), file.origin), file.origin)
    if not isinstance(values, list):
        raise UserError(f"{file.origin}: a JSON list belongs here, not {type(values).__name__}")
    yield from ((f"{file.origin}: entry {number}", value) for number, value in enumerate(values, start=1))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}:{error.lineno}"
        raise UserError(f"{place}: not JSON at column {error.colno} ({error.msg}); fetch the file again") from error


def separated(file: SourceFile, delimiter: str = ",", quoted: bool = True) -> Iterator[tuple[str, list[str]]]:
    """(`file:line`, fields) of every row of a CSV file that is not blank; `quoted` fields may hold newlines.

    Raises:
        UserError: it is no such file, or not UTF-8.
    """
    csv.field_size_limit(FIELD_BYTES)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    line = 1
    with file.opened() as opened:
        text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=quoted)
        try:
            for fields in reader:
                where, line = f"{file.origin}:{line}", reader.line_num + 1
                if any(fields):
                    yield where, fields
        except UnicodeDecodeError as error:
            raise UserError(f"{file.origin}:{line}: not UTF-8 near there; save it as UTF-8") from error
        except csv.Error as error:
            raise UserError(f"{file.origin}:{line}: cannot be read ({error}); fetch the file again") from error


def with_header(rows: Iterator[tuple[str, list[str]]], origin: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as fields by the names in the first row.

    Raises:
        UserError: there is no first row, or a row has more or fewer fields than it.
    """
    _, names = next(rows, ("", []))
    if not names:
        raise UserError(f"{origin}: is empty; its first line names the columns")
    for where, fields in rows:
        if len(fields) != len(names):
            raise UserError(f"{where}: {len(fields)} fields, where the first line names {len(names)}; mend the line")
        yield where, dict(zip(names, fields, strict=True))


def parallel(*files: SourceFile) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(`file:line` of the first, line of each) of files whose lines belong together; blank lines count.

    Raises:
        UserError: one has fewer lines than another.
    """
    for number, lines in enumerate(itertools.zip_longest(*(file.lines() for file in files)), start=1):
        ended = [file.origin for file, line in zip(files, lines, strict=True) if line is None]
        if ended:
            raise UserError(f"{ended[0]}: ends at line {number - 1}, the file beside it goes on; fetch both again")
        yield lines[0][0], tuple(text for _, text in lines)
