# SPDX-License-Identifier: Apache-2.0
"""A directory of tokenised shards as a source of records and as a corpus of tokens."""

import functools
import hashlib
import json
import pathlib
import threading
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from llm_jepa_jax.data.records import Record
from llm_jepa_jax.data.shard_files import (
    FORMAT,
    IDENTITY,
    MADE,
    MANIFEST,
    ReadRecord,
    decode,
    inputs_hash,
    read_index,
    token_type,
)
from llm_jepa_jax.data.tokenized import VERSION
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.interface import Tokenizer
from llm_jepa_jax.text.tokenizer import saved_tokenizer

READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
"""For one record at a time: Grain's source wakes a pool of threads for each, which took 26 times the processor time."""

MOST_OPEN = 256
"""Shards that are open at once: processes may have 1,024 files."""


class ShardSource:
    """The records of a directory that `--mode=prepare --shards` wrote: those of its JSONL files, in their order.

    Pickles as its directory.

    Raises:
        UserError: it is no such directory, is not finished, or a file of it is missing or damaged.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory).expanduser()
        self.manifest = _read_manifest(self.directory)
        self.content_hash = inputs_hash(self.manifest["inputs"])
        self._kind = token_type(self.manifest["vocab_size"])
        self._last: tuple[int, ReadRecord] | None = None
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[pathlib.Path]]:
        return ShardSource, (self.directory,)

    @functools.cached_property
    def index(self) -> dict[str, np.ndarray]:
        """The indices of all shards, one behind the other (`shard_files.INDEX`)."""
        found = [read_index(_index_data(self.directory, shard)) for shard in self.manifest["shards"]]
        return {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard["records"] for shard in self.manifest["shards"]])

    def _bytes(self, index: int) -> bytes:
        number = int(np.searchsorted(self._ends, index, side="right"))
        with self._lock:  # a reader has a place in its file
            if number not in self._readers:
                if len(self._readers) >= MOST_OPEN:
                    self._readers.pop(next(iter(self._readers))).close()
                path = self.directory / f"{self.manifest['shards'][number]['name']}.array_record"
                self._readers[number] = ArrayRecordReader(str(path), READER_OPTIONS)
            reader = self._readers[number]
            reader.seek(index - int(self._ends[number - 1] if number else 0))
            return reader.read()

    def read(self, index: int) -> ReadRecord:
        """A record's tokens. The last one read is at hand: what makes a row asks for its parts one by one."""
        last = self._last
        if last is None or last[0] != index:
            try:
                last = index, decode(self._bytes(index), self._kind)
            except (RuntimeError, ValueError, OSError) as error:
                words = " ".join(str(error).split())[:160]
                raise UserError(
                    f"{self.directory}: record {index} cannot be read ({words}); run its --mode=prepare command again, "
                    "which makes damaged shards anew"
                ) from error
            self._last = last
        return last[1]

    @property
    def lines(self) -> np.ndarray:
        return np.cumsum(self.index["member"] <= 0) - 1

    def __len__(self) -> int:
        return int(self.manifest["records"])

    def location(self, index: int) -> str:
        file, line, member = (int(self.index[name][index]) for name in ("input", "line", "member"))
        members = f", members {member + 1} and {member + 2}" if member >= 0 else ""
        return f"{self.manifest['inputs'][file]['file']}:{line}{members}"

    def __getitem__(self, index: int) -> Record:
        return self.read(index).record()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that they were made with, which lies beside them.

        Raises:
            UserError: it is missing or cannot be read.
        """
        found = saved_tokenizer(self.directory)
        if found is None:
            raise UserError(f"{self.directory}: its tokenizer is gone; run its --mode=prepare command again")
        return found

    def check(self, tokenizer: Tokenizer, pairs: str) -> None:
        """Refuses to train otherwise than the shards were made for.

        Raises:
            UserError: with the key that disagrees.
        """
        made, where = self.manifest, f"config: `data.train`={self.directory}"
        if made["rendering"] != VERSION:
            raise UserError(
                f"{where}: was made by another version of this program; run its --mode=prepare command again"
            )
        if made["tokenizer"] != tokenizer.fingerprint:
            raise UserError(
                f"{where}: its tokens are of another tokenizer or chat template ({made['tokenizer'][:12]}…, here "
                f"{tokenizer.fingerprint[:12]}…); name the one they were made with as `text.tokenizer`, or prepare anew"
            )
        if made["pairs"] != pairs:
            raise UserError(
                f"{where}: has the pairs of `data.pairs`={made['pairs']}, not {pairs}; set that, or prepare anew"
            )


def _read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if manifest["made"] != MADE:
            raise KeyError
    except FileNotFoundError:
        begun = (directory / IDENTITY).exists()
        raise UserError(
            f"{directory}: {'the shards are not finished; run its --mode=prepare command again' if begun else ''}"
            f"{'' if begun else 'is a directory; name a JSONL file, or one of shards (--mode=prepare --shards)'}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{directory}: its {MANIFEST} is none of shards; name a JSONL file, such as {directory / 'train.jsonl'}"
        ) from None
    if manifest["format"] != FORMAT:
        raise UserError(f"{directory}: shards of format {manifest['format']}, not {FORMAT}; prepare them again")
    for shard in manifest["shards"]:
        path = directory / f"{shard['name']}.array_record"
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise UserError(f"{path}: is missing or cut; run its --mode=prepare command again")
    return manifest


def _index_data(directory: pathlib.Path, shard: dict[str, Any]) -> bytes:
    path = directory / f"{shard['name']}.index.npz"
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != shard["index_sha256"]:
        raise UserError(f"{path}: is missing or damaged; run its --mode=prepare command again")
    return data
