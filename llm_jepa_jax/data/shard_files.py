# SPDX-License-Identifier: Apache-2.0
"""The files of tokenised shards: ArrayRecord with a record each, an index of lengths beside it, and a manifest.

A record is little-endian: int32 counts, then its tokens (uint16 where the vocabulary allows, else int32), then what the
record says as JSON, so that a directory of shards stands for the files it was made of. The index is what rows are
planned from, and where each record comes from.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jepa_jax.data.records import Pair, Record
from llm_jepa_jax.data.tokenized import TokenizedRecord
from llm_jepa_jax.text.interface import Message

FORMAT = "1"
"""Changes with what is said here."""
MANIFEST, IDENTITY = "manifest.json", "identity.json"
MADE = "shards"
VIEWS = ("text", "code")
INDEX = {
    "conversation": (np.int32, ()), "targets": (np.int32, ()), "contents": (np.int32, (4,)), "pairs": (np.int32, ()),
    "sentences": (np.int32, ()), "input": (np.int32, ()), "line": (np.int64, ()), "member": (np.int32, ()),
    "text_view": (np.int32, ()), "code_view": (np.int32, ()), "text_places": (np.int32, (2,)),
    "view_headers": (np.int32, (2,)), "bounds": (np.int32, ()),
}  # fmt: skip
"""Arrays of a shard's index. Of each record: tokens, assistant's targets, `contents`, pairs, number of `bounds`, and
where it comes from (number of the input, line from 1, place in a group or −1). Of each pair: tokens of its views,
`text_places`, `view_headers`. Of each sentence of plain text: `bounds`."""


def shard_name(number: int, count: int) -> str:
    """A shard's name, without ending."""
    return f"shard-{number:05d}-of-{count:05d}"


def token_type(vocab_size: int) -> type[np.integer]:
    """How token ids are kept."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def encode(tokens: TokenizedRecord, record: Record, kind: type[np.integer]) -> bytes:
    """The bytes of a record."""
    views = [view for pair in zip(*(tokens.views[name] for name in VIEWS), strict=True) for view in pair]
    counts = [len(tokens.conversation), len(views), *map(len, views)]
    said = (
        {"messages": [[m.role, m.content] for m in record.messages], "named": record.named} if record.messages else {}
    )
    return b"".join([
        np.array(counts, "<i4").tobytes(),
        np.concatenate([tokens.conversation, *views]).astype(np.dtype(kind).newbyteorder("<")).tobytes(),
        np.packbits(tokens.assistant_target).tobytes(),
        json.dumps(said or {"document": record.document}, ensure_ascii=False).encode("utf-8", "surrogatepass"),
    ])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReadRecord:
    """What a record's bytes hold."""

    conversation: np.ndarray
    """int32 [n]"""
    assistant_target: np.ndarray
    """bool [n]"""
    views: tuple[np.ndarray, ...]
    """int32: text and code view of the first pair, of the second, and so on."""
    said: bytes

    def record(self) -> Record:
        """The record itself."""
        said = json.loads(self.said.decode("utf-8", "surrogatepass"))
        if "document" in said:
            return Record(document=said["document"])
        return Record(tuple(Message(*m) for m in said["messages"]), tuple(Pair(*pair) for pair in said["named"]))


def decode(data: bytes, kind: type[np.integer]) -> ReadRecord:
    """Reads what `encode` wrote."""
    size, num_views = np.frombuffer(data, "<i4", 2).tolist()
    lengths = np.frombuffer(data, "<i4", num_views, 8)
    start, total = 8 + 4 * num_views, size + int(lengths.sum())
    tokens = np.frombuffer(data, np.dtype(kind).newbyteorder("<"), total, start).astype(np.int32)
    start += total * np.dtype(kind).itemsize
    stop = start + -(-size // 8)
    target = np.unpackbits(np.frombuffer(data[start:stop], np.uint8), count=size).astype(np.bool_)
    parts = np.split(tokens, np.cumsum([size, *lengths[:-1].tolist()])) if num_views else [tokens]
    return ReadRecord(parts[0], target, tuple(parts[1:]), data[stop:])


class IndexWriter:
    """The index of a shard, as its records are written."""

    def __init__(self) -> None:
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in INDEX}
        self._chunks: dict[str, list[np.ndarray]] = {name: [] for name in INDEX}

    def add(self, tokens: TokenizedRecord, number: int, line: int, member: int) -> None:
        """A record, and where it comes from: the number of its input, line, and place in a group or −1."""
        views = {f"{name}_view": [len(view) for view in tokens.views[name]] for name in VIEWS}
        values: dict[str, Any] = views | {
            "conversation": [len(tokens.conversation)], "targets": [np.count_nonzero(tokens.assistant_target)],
            "contents": tokens.contents[None], "pairs": [len(tokens.text_places)],
            "sentences": [len(tokens.sentences)], "input": [number], "line": [line], "member": [member],
            "text_places": tokens.text_places, "view_headers": tokens.view_headers, "bounds": tokens.sentences,
        }  # fmt: skip
        for name, (kind, tail) in INDEX.items():
            self._values[name].append(np.asarray(values[name], kind).reshape(-1, *tail))
        if len(self._values["line"]) >= 4096:
            self._join()

    def _join(self) -> None:
        """Small arrays cost many times what they hold."""
        for name, values in self._values.items():
            if values:
                self._chunks[name].append(np.concatenate(values))
                values.clear()

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, by the names of `INDEX`."""
        self._join()
        empty = {name: np.zeros((0, *tail), kind) for name, (kind, tail) in INDEX.items()}
        return {name: np.concatenate([empty[name], *self._chunks[name]]) for name in INDEX}


def index_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """An index as a file."""
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    return data.getvalue()


def read_index(data: bytes) -> dict[str, np.ndarray]:
    """The index in a file."""
    with np.load(io.BytesIO(data)) as arrays:
        return {name: arrays[name] for name in INDEX}


def inputs_hash(inputs: Sequence[dict[str, Any]]) -> str:
    """`Source.content_hash` of the files that shards were made of: that of their `JsonlSource`s."""
    hashes = [str(file["sha256"]) for file in inputs]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
