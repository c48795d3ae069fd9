# SPDX-License-Identifier: Apache-2.0
"""Rows of tables: Parquet, Arrow, CSV and JSON files of a directory, or a data set of the Hugging Face hub."""

import logging
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from llm_jepa_jax.errors import TryAgainError, UserError
from llm_jepa_jax.prepare.columns import no_column
from llm_jepa_jax.prepare.rows import json_lines, json_list, separated, with_header
from llm_jepa_jax.prepare.source_files import READ_ERRORS, SourceFile
from llm_jepa_jax.prepare.sources import Sources

LOG = logging.getLogger("llm_jepa_jax")
ENDINGS = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".json")
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json")
"""Files beside the rows that are none."""
SPLITS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "test": "test"}
"""What splits are called."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
BATCH_ROWS = 1024
Row = tuple[str, dict[str, Any]]


def split_of(name: str) -> str:
    """The split that a file's path tells, as `data/train-00000-of-00002.parquet` and `test/x.csv` do; else train."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS]
    return SPLITS[words[-1]] if words else "train"


def table_files(sources: Sources) -> list[SourceFile]:
    """The files that hold rows.

    Raises:
        UserError: there is none.
    """
    files = [f for f in sources.files if f.basename.endswith(ENDINGS) and f.basename not in METADATA]
    if not files:
        raise UserError(f"--source={sources.named}: has no table; rows are read from {', '.join(ENDINGS)} files")
    left = [f.name for f in sources.files if f not in files and f.basename not in METADATA]
    if left:
        LOG.info("not read: %d other files (%s%s)", len(left), ", ".join(left[:3]), ", …" if len(left) > 3 else "")
    return files


def table_rows(file: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    """(`file:line` or `file: row N`, values by column) of a table; of Parquet, these columns alone are read.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    name = file.basename
    if name.endswith((".parquet", ".arrow")):
        yield from _arrow_rows(file, columns)
    elif name.endswith((".csv", ".tsv")):
        yield from with_header(separated(file, "\t" if name.endswith(".tsv") else ","), file.origin)
    else:
        for where, row in json_list(file) if _is_list(file) else json_lines(file):
            if not isinstance(row, dict):
                raise UserError(f"{where}: a row is a JSON object, not {type(row).__name__}")
            yield where, row


def _is_list(file: SourceFile) -> bool:
    with file.opened() as opened:
        return opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def _arrow_rows(file: SourceFile, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow  # optional: only Parquet and Arrow files need it
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file.origin}: needs pyarrow, which is not installed; `pip install pyarrow`") from error
    if file.origin != str(file.container):
        raise UserError(f"{file.origin}: lies in an archive; unpack Parquet and Arrow files first")

    def batches() -> Iterator[Any]:
        if file.basename.endswith(".parquet"):
            with pyarrow.parquet.ParquetFile(file.container) as table:
                _check_columns(table.schema_arrow.names, columns, file.origin)
                yield from table.iter_batches(BATCH_ROWS, columns=list(columns))
            return
        with pyarrow.memory_map(str(file.container)) as mapped:
            try:
                stream = pyarrow.ipc.open_stream(mapped)  # what `datasets` writes
                yield from stream
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(mapped)
                yield from (table.get_batch(i) for i in range(table.num_record_batches))

    number = 0
    try:
        for batch in batches():
            _check_columns(batch.schema.names, columns, file.origin)
            for row in batch.select(list(columns)).to_pylist():
                number += 1
                yield f"{file.origin}: row {number}", row
    except (pyarrow.ArrowException, *READ_ERRORS) as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(f"{file.origin}: cannot be read behind row {number} ({words}); fetch it again") from error


def _check_columns(names: Sequence[str], wanted: Sequence[str], origin: str) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(f"{origin}: {no_column(missing[0], names)}")


def is_hub_name(source: str) -> bool:
    """Whether a source is `ORGANISATION/NAME[:CONFIGURATION]` of the hub, and nothing here."""
    return bool(HUB_NAME.fullmatch(source)) and not pathlib.Path(source).exists()


def hub_rows(name: str) -> Iterator[tuple[str, Row]]:
    """(split, row) of a data set of the hub, streamed.

    Raises:
        UserError: `datasets` is not installed, or the hub has no such data set.
        TryAgainError: there is no way to the hub.
    """
    try:
        import datasets  # optional: only data sets of the hub need it
    except ImportError as error:
        raise UserError(f"--source={name}: no such file; to read it from the hub, `pip install datasets`") from error
    path, _, configuration = name.partition(":")
    try:
        splits = datasets.load_dataset(path, configuration or None, streaming=True)
    except ConnectionError as error:
        raise TryAgainError(f"--source={name}: the hub cannot be reached ({error}); try again") from error
    except Exception as error:  # the library has many: no such name, no such configuration, a script that it refuses
        words = " ".join(str(error).split())[:200]
        raise UserError(f"--source={name}: the hub does not give it ({type(error).__name__}: {words})") from error
    for split, rows in splits.items():
        for number, row in enumerate(rows, start=1):
            yield SPLITS.get(split, split), (f"{name}:{split}: row {number}", row)
