# SPDX-License-Identifier: Apache-2.0
"""Random access to records: JSONL files through a byte-offset index, shards, the embedded corpus, and their splits."""

import bisect
import dataclasses
import functools
import hashlib
import json
import mmap
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llm_jepa_jax.config import DataConfig
from llm_jepa_jax.data import synthetic
from llm_jepa_jax.data.records import Record, parse_records
from llm_jepa_jax.data.shards import ShardSource
from llm_jepa_jax.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
UTF8_MARK = b"\xef\xbb\xbf"
GROUP = b'"group"'


class Source(Protocol):
    """Records by index."""

    content_hash: str
    """sha256 hex of what the records hold: the key of everything cached."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def location(self, index: int) -> str:
        """`file:line` of a record."""
        ...

    @property
    def lines(self) -> np.ndarray:
        """int64 [N]: number, from 0, of the line each record comes from; records of one line belong together."""
        ...


class JsonlSource:
    """A JSONL file, memory-mapped; blank lines are not records, and a line with a group of paraphrases is several.

    Pickles as its path and index, not its bytes.

    Raises:
        UserError: the file is missing, compressed, empty, or not UTF-8 (at the line read).
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path).expanduser()
        data = self._open()
        self.content_hash = hashlib.sha256(data).hexdigest()
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        starts = np.concatenate([[0], ends + 1])
        stops = np.concatenate([ends, [len(data)]])
        if data[:3] == UTF8_MARK:
            starts[0] = 3
        kept = [i for i in range(len(starts)) if data[starts[i] : stops[i]].strip()]
        if not kept:
            raise UserError(f"{self.path}: no records; each line holds one JSON object")
        self._starts, self._stops = starts[kept], stops[kept]
        self._line_numbers = np.asarray(kept) + 1
        counts = [_count(data[start:stop]) for start, stop in zip(self._starts, self._stops, strict=True)]
        self.lines = np.repeat(np.arange(len(kept)), counts)
        self._members = np.arange(len(self.lines)) - np.repeat(np.cumsum(counts) - counts, counts)

    def _open(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; name a JSONL file") from error
        except ValueError as error:  # a file of no bytes cannot be mapped
            raise UserError(f"{self.path}: the file is empty; each line holds one JSON object") from error
        if data[:2] == GZIP_MAGIC:
            raise UserError(f"{self.path}: gzip has no random access; run `gunzip {self.path}` and name the result")
        return data

    @functools.cached_property
    def _data(self) -> mmap.mmap:
        return self._open()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_data"}

    def __len__(self) -> int:
        return len(self.lines)

    def _where(self, line: int) -> str:
        return f"{self.path}:{self._line_numbers[line]}"

    def _raw(self, line: int) -> bytes:
        return self._data[self._starts[line] : self._stops[line]]

    def location(self, index: int) -> str:
        line, member = self.lines[index], self._members[index]
        members = f", members {member + 1} and {member + 2}" if GROUP in self._raw(line) else ""
        return self._where(line) + members

    def __getitem__(self, index: int) -> Record:
        line = self.lines[index]
        where = self._where(line)
        try:
            text = self._raw(line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; save it as UTF-8") from error
        records = parse_records(text, where)
        if len(records) > 1 and GROUP not in self._raw(line):
            raise UserError(f'{where}: the key `group` is written with escapes; write it as "group"')
        return records[self._members[index]]


def _count(line: bytes) -> int:
    """Records of a line; 1 where it is wrong, which is said when it is read."""
    if GROUP not in line:
        return 1
    try:
        value = json.loads(line)
    except ValueError:
        return 1
    members = value.get("group") if isinstance(value, dict) else None
    return max(1, len(members) - 1) if isinstance(members, list) else 1


class SyntheticSource:
    """One split of the embedded corpus, made when first read."""

    def __init__(self, split: str, num_train: int, num_eval: int):
        self.split, self._sizes = split, (num_train, num_eval)
        key = f"synthetic {synthetic.VERSION} {split} {num_train} {num_eval}"
        self.content_hash = hashlib.sha256(key.encode()).hexdigest()

    @property
    def lines(self) -> np.ndarray:
        return np.arange(len(self))

    @functools.cached_property
    def _records(self) -> Sequence[Record]:
        train, evaluation = synthetic.generate(*self._sizes)
        return train if self.split == "train" else evaluation

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __len__(self) -> int:
        return self._sizes[0] if self.split == "train" else self._sizes[1]

    def location(self, index: int) -> str:
        return f"synthetic:{self.split}:{index + 1}"

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


class Subset:
    """Some records of a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.content_hash = hashlib.sha256(
            source.content_hash.encode() + indices.astype(np.int64).tobytes()
        ).hexdigest()

    @property
    def lines(self) -> np.ndarray:
        return self.source.lines[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def location(self, index: int) -> str:
        return self.source.location(int(self.indices[index]))

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]


class Concatenated:
    """Several sources as one, in order."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources]).tolist()
        self.content_hash = hashlib.sha256(" ".join(s.content_hash for s in sources).encode()).hexdigest()

    @property
    def lines(self) -> np.ndarray:
        lines = [source.lines for source in self.sources]
        firsts = np.cumsum([0, *(numbers[-1] + 1 for numbers in lines[:-1])])
        return np.concatenate([numbers + first for numbers, first in zip(lines, firsts, strict=True)])

    def _place(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def location(self, index: int) -> str:
        source, place = self._place(index)
        return source.location(place)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source, place = self._place(index)
        return source[place]


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training records with their copies an epoch, and evaluation records."""

    train: Source
    weights: np.ndarray
    """float64 [len(train)]: copies of each record an epoch."""
    eval: Source


def open_splits(config: DataConfig, seed: int) -> Splits:
    """Opens what `data.train` and `data.eval` name.

    Raises:
        UserError: a file or a weight is wrong.
    """
    train, weights = _open_all(config.train, "data.train", config, "train")
    if config.eval:
        evaluation, _ = _open_all(config.eval, "data.eval", config, "eval")
        return Splits(train, weights, evaluation)
    if config.train == "synthetic":
        return Splits(train, weights, SyntheticSource("eval", config.synthetic_train, config.synthetic_eval))
    lines = train.lines
    num_lines = int(lines[-1]) + 1
    held = round(num_lines * config.eval_share)
    if not 0 < held < num_lines:
        raise UserError(
            f"config: `data.eval_share`={config.eval_share} of {num_lines} lines leaves a split empty; set `data.eval`"
        )
    # Whole lines: a paraphrase of what is trained on would be no test.
    order = np.random.default_rng([seed, num_lines]).permutation(num_lines)
    held_out = np.isin(lines, order[:held])
    kept = np.flatnonzero(~held_out)
    return Splits(Subset(train, kept), weights[kept], Subset(train, np.flatnonzero(held_out)))


def shard_sources(source: Source) -> list[ShardSource]:
    """The directories of shards that a source is made of, wholly or in part."""
    if isinstance(source, Subset):
        return shard_sources(source.source)
    if isinstance(source, Concatenated):
        return [found for part in source.sources for found in shard_sources(part)]
    return [source] if isinstance(source, ShardSource) else []


def with_conversation(source: Source) -> Subset:
    """The records that can be asked: all but plain text."""
    return Subset(source, np.array([i for i in range(len(source)) if source[i].messages], np.int64))


def absolute_paths(config: DataConfig) -> DataConfig:
    """The configuration with absolute file names, so that a run can be opened from anywhere."""

    def absolute(spec: str) -> str:
        parts = [[text.strip() for text in part.partition("*")] for part in spec.split(",")]
        named = [
            (n if n in ("", "synthetic") else str(pathlib.Path(n).expanduser().absolute()), s, w) for n, s, w in parts
        ]
        return ",".join("".join(part) for part in named)

    return dataclasses.replace(config, train=absolute(config.train), eval=absolute(config.eval))


def _open_all(spec: str, key: str, config: DataConfig, split: str) -> tuple[Source, np.ndarray]:
    sources, weights = [], []
    for part in spec.split(","):
        name, star, weight_text = (text.strip() for text in part.partition("*"))
        weight = _weight(weight_text, key, part) if star else 1.0
        if name == "synthetic":
            source: Source = SyntheticSource(split, config.synthetic_train, config.synthetic_eval)
        elif name:
            source = ShardSource(name) if pathlib.Path(name).expanduser().is_dir() else JsonlSource(name)
        else:
            raise UserError(f"config: `{key}`={spec} has an empty name; use `a.jsonl,b.jsonl*0.5`")
        sources.append(source)
        weights.append(np.full(len(source), weight))
    return (sources[0] if len(sources) == 1 else Concatenated(sources)), np.concatenate(weights)


def _weight(text: str, key: str, part: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"config: `{key}` has {part!r}; a weight is copies of each record an epoch, a number above 0")
    return weight
