# SPDX-License-Identifier: Apache-2.0
"""Tables to JSONL by columns: `--mode=prepare --source=DIR --columns=…`."""

import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.columns import parse_columns
from llm_jepa_jax.prepare.dataset import Drop
from llm_jepa_jax.prepare.sources import Sources, check_sums, open_sources
from llm_jepa_jax.prepare.tables import Row, hub_rows, is_hub_name, split_of, table_files, table_rows
from llm_jepa_jax.prepare.written import writing

LOG = logging.getLogger("llm_jepa_jax")
CARD = "README.md"
LICENCE = re.compile(r"\A---\s*\n(?:.*\n)*?license:\s*(\S.*?)\s*\n(?:.*\n)*?---")
"""In the front matter of a data set's card."""


def prepare_columns(
    source: str, columns_text: str, sha256: str, out: pathlib.Path, cache_dir: pathlib.Path
) -> dict[str, Any]:
    """Writes the rows of tables as JSONL, a file a split, and a manifest.

    Args:
        source: files, directories or https addresses, with commas; or `ORGANISATION/NAME[:CONFIGURATION]` of the hub.
        columns_text: see `columns.parse_columns`.
        sha256: expected checksum, where one file is read.
        out: directory to write.
        cache_dir: where fetched files are kept.

    Raises:
        UserError: wrong columns, source or row.
    """
    columns = parse_columns(columns_text)
    facts: list[dict[str, str | int]] = []
    licence = ""
    if source and is_hub_name(source):
        if sha256:
            raise UserError(f"--sha256: is of a file; --source={source} is a data set of the hub")
        rows = hub_rows(source)
        facts.append({"hub": source})
    else:
        sources = open_sources(source, (), cache_dir)
        files = table_files(sources)
        facts = check_sums(sources, files, (), sha256)
        licence = _licence(sources)

        def all_rows() -> Iterator[tuple[str, Row]]:
            for file in files:
                yield from ((split_of(file.name), row) for row in table_rows(file, columns.names))

        rows = all_rows()
    LOG.info("licence %s", licence or "not stated beside the files; the data set's card has it")
    made = {
        "made": f"columns {columns_text}", "licence": licence, "sources": facts, "split_rule": "as files are named",
    }  # fmt: skip
    with writing(out, made) as written:
        for split, (where, row) in rows:
            try:
                line = columns.record(row, where)
            except Drop as drop:
                written.drop(str(drop), where)
                continue
            written.add(split, line, where)
    return made | {"out": str(out)}


def _licence(sources: Sources) -> str:
    """What the card beside the files says; empty where there is none, or it does not say."""
    for file in sources.files:
        if file.basename == CARD:
            with file.opened() as opened:
                found = LICENCE.match(opened.read().decode("utf-8", errors="replace"))
            return found[1] if found else ""
    return ""
