# SPDX-License-Identifier: Apache-2.0
"""A corpus whose lengths are in memory and whose tokens are read record by record: shards, and mixtures with them."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np

from llm_jepa_jax.data.corpus import TokenizedCorpus, tokenize_source
from llm_jepa_jax.data.cuts import Texts
from llm_jepa_jax.data.shard_files import VIEWS, ReadRecord
from llm_jepa_jax.data.shards import ShardSource
from llm_jepa_jax.data.sources import Concatenated, Source, Subset, shard_sources
from llm_jepa_jax.text.interface import Tokenizer

OF_RECORDS = ("conversation", "targets", "contents", "pairs", "sentences")
OF_PAIRS = ("text_view", "code_view", "text_places", "view_headers")
"""Of the arrays of an index (`shard_files.INDEX`); `bounds` are the rest."""


class Reader(Protocol):
    """Where tokens come from."""

    def read(self, index: int) -> ReadRecord: ...


@dataclasses.dataclass(frozen=True)
class IndexedCorpus:
    """N records and their Q pairs with the methods of `TokenizedCorpus`."""

    readers: tuple[Reader, ...]
    reader_N: np.ndarray
    """int64 [N]: which of the readers has each record."""
    place_N: np.ndarray
    """int64 [N]: which of its records it is."""
    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.reader_N)

    def _read(self, record: int) -> ReadRecord:
        return self.readers[self.reader_N[record]].read(int(self.place_N[record]))

    def get(self, name: str, index: int) -> np.ndarray:
        """As `TokenizedCorpus.get`, of `conversation`, `assistant_target`, `text_view` and `code_view`."""
        if name == "conversation":
            return self._read(index).conversation
        if name == "assistant_target":
            return self._read(index).assistant_target
        record = int(np.searchsorted(self.pair_offsets, index, side="right")) - 1
        pair = index - int(self.pair_offsets[record])
        return self._read(record).views[len(VIEWS) * pair + VIEWS.index(name.removesuffix("_view"))]

    def lengths(self, name: str) -> np.ndarray:
        """As `TokenizedCorpus.lengths`."""
        return self.arrays[name].astype(np.int64)

    @property
    def contents(self) -> np.ndarray:
        return self.arrays["contents"]

    @functools.cached_property
    def pair_offsets(self) -> np.ndarray:
        return _offsets(self.arrays["pairs"])

    @property
    def text_places(self) -> np.ndarray:
        return self.arrays["text_places"]

    @property
    def view_headers(self) -> np.ndarray:
        return self.arrays["view_headers"]

    @functools.cached_property
    def texts(self) -> Texts:
        return Texts(self.arrays["bounds"], _offsets(self.arrays["sentences"]))

    def num_targets(self, targets: str) -> np.ndarray:
        """As `TokenizedCorpus.num_targets`."""
        return self.lengths("conversation") - 1 if targets == "all" else self.arrays["targets"].astype(np.int64)

    def take(self, indices: np.ndarray) -> "IndexedCorpus":
        """Some of the records."""
        pairs = _members(_offsets(self.arrays["pairs"]), indices)
        bounds = _members(_offsets(self.arrays["sentences"]), indices)
        arrays = {name: self.arrays[name][indices] for name in OF_RECORDS}
        arrays |= {name: self.arrays[name][pairs] for name in OF_PAIRS} | {"bounds": self.arrays["bounds"][bounds]}
        return IndexedCorpus(self.readers, self.reader_N[indices], self.place_N[indices], arrays)


@dataclasses.dataclass(frozen=True)
class _Cached:
    """A corpus of the cache, read as shards are."""

    corpus: TokenizedCorpus

    def read(self, index: int) -> ReadRecord:
        corpus, (start, stop) = self.corpus, self.corpus.pair_offsets[index : index + 2].tolist()
        views = tuple(corpus.get(f"{name}_view", pair) for pair in range(start, stop) for name in VIEWS)
        return ReadRecord(corpus.get("conversation", index), corpus.get("assistant_target", index), views, b"")

    def arrays(self) -> dict[str, np.ndarray]:
        corpus = self.corpus
        lengths = {name: corpus.lengths(name) for name in ("conversation", "sentences", "text_view", "code_view")}
        return lengths | {
            "targets": corpus.num_targets("assistant"), "contents": corpus.contents,
            "pairs": np.diff(corpus.pair_offsets), "text_places": corpus.text_places,
            "view_headers": corpus.view_headers, "bounds": corpus.texts.bounds,
        }  # fmt: skip


def joined(corpora: Sequence[IndexedCorpus]) -> IndexedCorpus:
    """Several corpora as one, in order."""
    firsts = np.cumsum([0, *(len(corpus.readers) for corpus in corpora)])
    return IndexedCorpus(
        tuple(reader for corpus in corpora for reader in corpus.readers),
        np.concatenate([corpus.reader_N + first for corpus, first in zip(corpora, firsts, strict=False)]),
        np.concatenate([corpus.place_N for corpus in corpora]),
        {n: np.concatenate([c.arrays[n] for c in corpora]) for n in (*OF_RECORDS, *OF_PAIRS, "bounds")},
    )


Corpus: TypeAlias = TokenizedCorpus | IndexedCorpus


def tokenized(source: Source, tokenizer: Tokenizer, cache_dir: pathlib.Path, pairs: str) -> Corpus:
    """The tokens of a source's records: those of shards as they are, of all else as `tokenize_source` has them.

    Raises:
        UserError: as there; and shards that were made for another tokenizer or other pairs.
    """
    if not shard_sources(source):
        return tokenize_source(source, tokenizer, cache_dir, pairs)
    return _indexed(source, tokenizer, cache_dir, pairs)


def _indexed(source: Source, tokenizer: Tokenizer, cache_dir: pathlib.Path, pairs: str) -> IndexedCorpus:
    if isinstance(source, Subset):
        return _indexed(source.source, tokenizer, cache_dir, pairs).take(source.indices)
    if isinstance(source, Concatenated):
        return joined([_indexed(part, tokenizer, cache_dir, pairs) for part in source.sources])
    if isinstance(source, ShardSource):
        source.check(tokenizer, pairs)
        reader, arrays = source, source.index
    else:
        cached = _Cached(tokenize_source(source, tokenizer, cache_dir, pairs))
        reader, arrays = cached, cached.arrays()  # type: ignore[assignment]
    return IndexedCorpus((reader,), np.zeros(len(source), np.int64), np.arange(len(source)), arrays)


def _offsets(counts: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each one's members begin among all."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _members(offsets: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The places of all members of some, one behind the other."""
    counts = np.diff(offsets)[chosen]
    places = _offsets(counts)
    return np.repeat(offsets[chosen] - places[:-1], counts) + np.arange(places[-1])
