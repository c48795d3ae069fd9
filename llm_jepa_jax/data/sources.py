# SPDX-License-Identifier: Apache-2.0
"""Random access to records: JSONL files through a byte-offset index, the embedded corpus, and splits of both."""

import bisect
import dataclasses
import functools
import hashlib
import mmap
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llm_jepa_jax.config import DataConfig
from llm_jepa_jax.data import synthetic
from llm_jepa_jax.data.records import Record, parse_record
from llm_jepa_jax.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
UTF8_MARK = b"\xef\xbb\xbf"


class Source(Protocol):
    """Records by index."""

    content_hash: str
    """sha256 hex of what the records hold: the key of everything cached."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def location(self, index: int) -> str:
        """`file:line` of a record."""
        ...


class JsonlSource:
    """A JSONL file, memory-mapped; blank lines are not records. Pickles as its path and index, not its bytes.

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

    def _open(self) -> mmap.mmap:
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a directory; name a JSONL file")
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
        return len(self._starts)

    def location(self, index: int) -> str:
        return f"{self.path}:{self._line_numbers[index]}"

    def __getitem__(self, index: int) -> Record:
        raw = self._data[self._starts[index] : self._stops[index]]
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.location(index)}: not UTF-8 at byte {error.start} of the line; save it as UTF-8"
            ) from error
        return parse_record(line, self.location(index))


class SyntheticSource:
    """One split of the embedded corpus, made when first read."""

    def __init__(self, split: str, num_train: int, num_eval: int):
        self.split, self._sizes = split, (num_train, num_eval)
        key = f"synthetic {synthetic.VERSION} {split} {num_train} {num_eval}"
        self.content_hash = hashlib.sha256(key.encode()).hexdigest()

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
        self._source, self._indices = source, indices
        self.content_hash = hashlib.sha256(
            source.content_hash.encode() + indices.astype(np.int64).tobytes()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def location(self, index: int) -> str:
        return self._source.location(int(self._indices[index]))

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]


class Concatenated:
    """Several sources as one, in order."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources]).tolist()
        self.content_hash = hashlib.sha256(" ".join(s.content_hash for s in sources).encode()).hexdigest()

    def _place(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)

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
    held = round(len(train) * config.eval_share)
    if not 0 < held < len(train):
        raise UserError(
            f"config: `data.eval_share`={config.eval_share} of {len(train)} records leaves a split empty; "
            "set `data.eval`"
        )
    order = np.random.default_rng([seed, len(train)]).permutation(len(train))
    kept = np.sort(order[held:])
    return Splits(Subset(train, kept), weights[kept], Subset(train, np.sort(order[:held])))


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
            source = JsonlSource(name)
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
