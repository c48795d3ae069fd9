# SPDX-License-Identifier: Apache-2.0
"""Prepared records on disk: a JSONL file a split, whole or not at all, with everything counted."""

import collections
import contextlib
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

from llm_jepa_jax.data.records import parse_records
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.checkpoint_files import write_whole

LOG = logging.getLogger("llm_jepa_jax")
MANIFEST = "manifest.json"
SHOWN = 3
"""Dropped rows of a reason that are named."""


class Written:
    """Splits being written into a directory."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._files: dict[str, TextIO] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        """Lines of each split."""
        self.dropped: collections.Counter[str] = collections.Counter()
        """Rows that became no record, by reason."""
        self._first: dict[str, list[str]] = {}

    def add(self, split: str, line: dict[str, Any], where: str) -> None:
        """Writes one record.

        Raises:
            UserError: with `where`, it is none that training could read.
        """
        text = json.dumps(line)
        parse_records(text, where)
        if split not in self._files:
            self._files[split] = (self._directory / f".{split}.jsonl.part").open("w", encoding="utf-8", newline="\n")
        self._files[split].write(text + "\n")
        self.counts[split] += 1

    def drop(self, reason: str, where: str) -> None:
        """Counts a row that becomes no record."""
        self.dropped[reason] += 1
        first = self._first.setdefault(reason, [])
        if len(first) < SHOWN:
            first.append(where)

    def close(self, keep: bool) -> None:
        """Gives the files their names, or removes them."""
        for split, file in self._files.items():
            file.close()
            part = self._directory / f".{split}.jsonl.part"
            part.replace(self._directory / f"{split}.jsonl") if keep else part.unlink()

    def report(self) -> dict[str, Any]:
        """Counts, as they are printed and kept."""
        for reason, count in self.dropped.items():
            more = ", …" if count > SHOWN else ""
            LOG.warning("%d rows dropped: %s (%s%s)", count, reason, ", ".join(self._first[reason]), more)
        return {"splits": dict(self.counts), "dropped": dict(self.dropped)}


@contextlib.contextmanager
def writing(directory: pathlib.Path, facts: dict[str, Any]) -> Iterator[Written]:
    """Writes splits, and behind them a manifest of `facts` and counts, which the facts then have too.

    The directory is new, empty, or holds an earlier preparation of the same (`facts["made"]`), which is replaced.

    Raises:
        UserError: it holds something else, or no record is left to write.
    """
    earlier = claim_directory(directory, facts["made"])
    written = Written(directory)
    kept = False
    try:
        yield written
        facts |= written.report()
        if not written.counts:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in facts["dropped"].items())
            raise UserError(f"--source: no record is left of it ({reasons or 'it has no rows'}); is it the right one?")
        write_manifest(directory, facts)
        for split in earlier - written.counts.keys():
            (directory / f"{split}.jsonl").unlink(missing_ok=True)  # it would not be what the manifest says
        kept = True
    finally:
        written.close(kept)


def claim_directory(directory: pathlib.Path, made: str) -> set[str]:
    """Makes the directory, and returns the splits that an earlier preparation called `made` left in it.

    Raises:
        UserError: it cannot be written, or holds something else.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={directory}: cannot write there: {error.strerror}; name another directory") from error
    if not any(path for path in directory.iterdir() if not path.name.endswith(".part")):
        return set()
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        found, splits = manifest["made"], set(manifest["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--out={directory}: is not empty, and nothing prepared; name a new directory") from None
    if found != made:
        raise UserError(f"--out={directory}: holds {found}, not {made}; name another directory")
    return splits


def write_manifest(directory: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes what a preparation was made of and came to."""
    write_whole(directory / MANIFEST, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
