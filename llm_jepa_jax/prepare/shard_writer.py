# SPDX-License-Identifier: Apache-2.0
"""One shard: lines to tokens on disk, in a process of its own."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llm_jepa_jax.data.records import parse_records
from llm_jepa_jax.data.shard_files import IndexWriter, encode, index_bytes, token_type
from llm_jepa_jax.data.tokenized import tokenize_record
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.line_ranges import Span
from llm_jepa_jax.prepare.source_files import sha256_of
from llm_jepa_jax.text.checkpoint_files import write_whole
from llm_jepa_jax.text.interface import Tokenizer

STOP_LINES = 256
"""Lines between two looks at whether to go on."""
GROUP_SIZE = "group_size:1"
"""Of an ArrayRecord file: each record can be read by itself."""


class Event(Protocol):
    """What `multiprocessing.Event` is."""

    def is_set(self) -> bool: ...


class Stopped(Exception):
    """Another shard failed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to write."""

    directory: pathlib.Path
    name: str
    spans: Sequence[Span]


@dataclasses.dataclass(frozen=True)
class Worker:
    """What a process has for all its shards."""

    tokenizer: Tokenizer
    pairs: str
    stop: Event

    def write(self, job: Job) -> dict[str, Any]:
        """Writes a shard and its index, each whole or not at all, and returns its entry of the manifest.

        Raises:
            UserError: a line is wrong (`file:line`), or there is no room.
            Stopped: see there.
        """
        part = job.directory / f".{job.name}.array_record.part"
        try:
            arrays = self._records(job, part)
            data = index_bytes(arrays)
            entry = {
                "name": job.name, "records": len(arrays["line"]),
                "pairs": int(arrays["pairs"].sum()), "tokens": int(arrays["conversation"].sum(dtype=np.int64)),
                "view_tokens": int(sum(arrays[f"{view}_view"].sum(dtype=np.int64) for view in ("text", "code"))),
                "bytes": part.stat().st_size, "sha256": sha256_of(part),
                "index_sha256": hashlib.sha256(data).hexdigest(),
            }  # fmt: skip
            write_whole(job.directory / f"{job.name}.index.npz", data)
            part.replace(job.directory / f"{job.name}.array_record")
            write_whole(job.directory / f"{job.name}.json", json.dumps(entry).encode())
        finally:
            part.unlink(missing_ok=True)
        return entry | {"peak_rss_mib": peak_rss_mib()}

    def _records(self, job: Job, path: pathlib.Path) -> dict[str, np.ndarray]:
        index, kind = IndexWriter(), token_type(self.tokenizer.vocab_size)
        with _array_record(path) as writer:
            for span in job.spans:
                for count, (number, where, text) in enumerate(span.lines()):
                    if count % STOP_LINES == 0 and self.stop.is_set():
                        raise Stopped
                    records = parse_records(text, where)
                    for member, record in enumerate(records):
                        tokens = tokenize_record(record, self.tokenizer, self.pairs, where)
                        writer.write(encode(tokens, record, kind))
                        index.add(tokens, span.file, number, member if len(records) > 1 else -1)
        return index.arrays()


@contextlib.contextmanager
def _array_record(path: pathlib.Path) -> Iterator[ArrayRecordWriter]:
    """A file to write records to; what goes wrong with it is only known when it is closed."""
    writer = ArrayRecordWriter(str(path), GROUP_SIZE)
    try:
        yield writer
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        raise
    try:
        writer.close()
    except RuntimeError as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: cannot be written ({words}); make room, then run the same command again: whole shards are kept"
        ) from error


def kept(job: Job) -> dict[str, Any] | None:
    """The entry of a shard that an earlier run finished; None where it did not, or its files are damaged."""
    record, index, said = (job.directory / f"{job.name}.{end}" for end in ("array_record", "index.npz", "json"))
    try:
        entry = json.loads(said.read_text())
        good = record.stat().st_size == entry["bytes"] and sha256_of(record) == entry["sha256"]
        return entry if good and sha256_of(index) == entry["index_sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def peak_rss_mib() -> float:
    """The most memory that this process has held, in MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)
