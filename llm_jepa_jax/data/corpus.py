# SPDX-License-Identifier: Apache-2.0
"""Records as token ids: made once, kept on disk by content hash, memory-mapped by every process and worker."""

import dataclasses
import functools
import hashlib
import pathlib
import shutil
import tempfile

import numpy as np

from llm_jepa_jax.data.cuts import Texts
from llm_jepa_jax.data.sources import Source
from llm_jepa_jax.data.tokenized import VERSION, tokenize_record
from llm_jepa_jax.text.interface import Tokenizer

RAGGED = ("conversation", "sentences", "text_view", "code_view")
"""Arrays of different length for each record or, views, for each pair."""
ALIGNED = ("assistant_target",)
"""Arrays with one value for every token of the conversations."""
FIXED = ("contents", "text_places", "view_headers", "pair_offsets")


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """Memory-mapped ragged arrays of N records and their Q pairs; pickles as its directory.

    `conversation` (of each record, plain text too), `text_view` and `code_view` (of each pair of a conversation) hold
    int32 token ids, views without predictor tokens or end-of-turn token; `assistant_target` (bool) goes with the tokens
    of `conversation`; `sentences` are plain text's (`cuts.Texts`).
    """

    directory: pathlib.Path

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        names = [*RAGGED, *ALIGNED, *FIXED, *(f"{name}_offsets" for name in RAGGED)]
        # As plain arrays over the mapped memory: slicing a `np.memmap` costs several times as much.
        return {name: np.asarray(np.load(self.directory / f"{name}.npy", mmap_mode="r")) for name in names}

    def __getstate__(self) -> dict[str, object]:
        return {"directory": self.directory}

    def __len__(self) -> int:
        return len(self._arrays["conversation_offsets"]) - 1

    def get(self, name: str, index: int) -> np.ndarray:
        """One record's or pair's values of one ragged or aligned array."""
        offsets = self._arrays[f"{name}_offsets" if name in RAGGED else "conversation_offsets"]
        return self._arrays[name][offsets[index] : offsets[index + 1]]

    def lengths(self, name: str) -> np.ndarray:
        """int64 [N] tokens of each record's conversation, or [Q] of each pair's view."""
        return np.diff(self._arrays[f"{name}_offsets"])

    @property
    def contents(self) -> np.ndarray:
        """int32 [N, 4]: places in each conversation, before the last user turn's content, of its last token, and the
        same of the last assistant turn; of plain text its content, and nothing behind it."""
        return self._arrays["contents"]

    @property
    def pair_offsets(self) -> np.ndarray:
        """int64 [N + 1]: where each record's pairs begin among all."""
        return self._arrays["pair_offsets"]

    @property
    def text_places(self) -> np.ndarray:
        """int32 [Q, 2]: first and last place of each text view inside the conversation, where it is the content of a
        user turn; else −1. A view with nothing before it begins with the conversation, others with their role."""
        return self._arrays["text_places"]

    @property
    def view_headers(self) -> np.ndarray:
        """int32 [Q, 2]: tokens before the content of each text view and of each code view."""
        return self._arrays["view_headers"]

    @property
    def texts(self) -> Texts:
        """The plain texts among the records."""
        return Texts(self._arrays["sentences"], self._arrays["sentences_offsets"])

    def num_targets(self, targets: str) -> np.ndarray:
        """int64 [N] next-token targets of each record, for `objective.ntp.targets`."""
        if targets == "all":
            return self.lengths("conversation") - 1  # the first token has nothing before it
        ends = np.concatenate([[0], np.cumsum(self._arrays["assistant_target"], dtype=np.int64)])
        return np.diff(ends[self._arrays["conversation_offsets"]])


def tokenize_source(source: Source, tokenizer: Tokenizer, cache_dir: pathlib.Path, pairs: str) -> TokenizedCorpus:
    """The tokenised records of `source` and their pairs under `data.pairs`, from the cache where it has them.

    Raises:
        UserError: a record is wrong, or the chat template does not fit it (with its `file:line`).
    """
    key = f"{source.content_hash} {tokenizer.fingerprint} {pairs} {VERSION}"
    directory = cache_dir / "tokenized" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix=".part-"))
        try:
            _write(source, tokenizer, part, pairs)
            _publish(part, directory)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return TokenizedCorpus(directory)


def _publish(part: pathlib.Path, directory: pathlib.Path) -> None:
    try:
        part.rename(directory)
    except OSError:
        if not directory.exists():  # else another process was faster with the same content
            raise


def _write(source: Source, tokenizer: Tokenizer, directory: pathlib.Path, which: str) -> None:
    values: dict[str, list[np.ndarray]] = {name: [] for name in (*RAGGED, *ALIGNED)}
    contents: list[np.ndarray] = []
    text_places: list[list[int]] = []
    view_headers: list[list[int]] = []
    pair_offsets = [0]
    for index in range(len(source)):
        record = tokenize_record(source[index], tokenizer, which, source.location(index))
        values["conversation"].append(record.conversation)
        values["assistant_target"].append(record.assistant_target)
        values["sentences"].append(record.sentences)
        values["text_view"] += record.views["text"]
        values["code_view"] += record.views["code"]
        contents.append(record.contents)
        text_places += record.text_places.tolist()
        view_headers += record.view_headers.tolist()
        pair_offsets.append(len(text_places))
    np.save(directory / "contents.npy", np.array(contents, np.int32))
    np.save(directory / "text_places.npy", np.array(text_places, np.int32).reshape(-1, 2))
    np.save(directory / "view_headers.npy", np.array(view_headers, np.int32).reshape(-1, 2))
    np.save(directory / "pair_offsets.npy", np.array(pair_offsets, np.int64))
    for name, arrays in values.items():
        np.save(directory / f"{name}.npy", np.concatenate(arrays) if arrays else np.zeros(0, np.int32))
        if name in RAGGED:
            offsets = np.cumsum([0, *map(len, arrays)])
            np.save(directory / f"{name}_offsets.npy", offsets.astype(np.int64))
