# SPDX-License-Identifier: Apache-2.0
"""Records as token ids: made once, kept on disk by content hash, memory-mapped by every process and worker."""

import dataclasses
import functools
import hashlib
import pathlib
import shutil
import tempfile

import numpy as np

from llm_jepa_jax.data.sources import Source
from llm_jepa_jax.text.chat import render, render_view
from llm_jepa_jax.text.tokenizer import Tokenizer

VERSION = "3"
"""Changes with the layout of the files or the rendering of a conversation."""
RAGGED = ("conversation", "text_view", "code_view")
ALIGNED = ("roles", "assistant_target")
"""Arrays with one value for every token of the conversations."""


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """Memory-mapped ragged arrays of N records; pickles as its directory.

    `conversation`, `text_view` and `code_view` hold int32 token ids (views without predictor tokens or end-of-turn
    token), `roles` (uint8) and `assistant_target` (bool) go with the tokens of `conversation`.
    """

    directory: pathlib.Path

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        names = [*RAGGED, *ALIGNED, "contents", "text_inside", *(f"{name}_offsets" for name in RAGGED)]
        # As plain arrays over the mapped memory: slicing a `np.memmap` costs several times as much.
        return {name: np.asarray(np.load(self.directory / f"{name}.npy", mmap_mode="r")) for name in names}

    def __getstate__(self) -> dict[str, object]:
        return {"directory": self.directory}

    def __len__(self) -> int:
        return len(self._arrays["conversation_offsets"]) - 1

    def get(self, name: str, index: int) -> np.ndarray:
        """One record's values of one ragged or aligned array."""
        offsets = self._arrays[f"{name}_offsets" if name in RAGGED else "conversation_offsets"]
        return self._arrays[name][offsets[index] : offsets[index + 1]]

    def lengths(self, name: str) -> np.ndarray:
        """int64 [N] tokens of each record's conversation or view."""
        return np.diff(self._arrays[f"{name}_offsets"])

    @property
    def contents(self) -> np.ndarray:
        """int32 [N, 4]: places in each conversation, before the last user turn's content, of its last token, and the
        same of the last assistant turn."""
        return self._arrays["contents"]

    @property
    def text_inside(self) -> np.ndarray:
        """bool [N]: the text view is the content of the last user turn."""
        return self._arrays["text_inside"]

    def num_targets(self, targets: str) -> np.ndarray:
        """int64 [N] next-token targets of each record, for `objective.ntp.targets`."""
        if targets == "all":
            return self.lengths("conversation") - 1  # the first token has nothing before it
        ends = np.concatenate([[0], np.cumsum(self._arrays["assistant_target"], dtype=np.int64)])
        return np.diff(ends[self._arrays["conversation_offsets"]])


def tokenize_source(source: Source, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> TokenizedCorpus:
    """The tokenised records of `source`, from the cache where it has them.

    Raises:
        UserError: a record is wrong (with its `file:line`).
    """
    key = f"{source.content_hash} {tokenizer.fingerprint} {VERSION}"
    directory = cache_dir / "tokenized" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix=".part-"))
        try:
            _write(source, tokenizer, part)
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


def _write(source: Source, tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    values: dict[str, list[np.ndarray]] = {name: [] for name in (*RAGGED, *ALIGNED)}
    contents, text_inside = [], []
    for index in range(len(source)):
        record = source[index]
        rendered = render(tokenizer, record.messages)
        values["conversation"].append(rendered.tokens)
        values["roles"].append(rendered.roles)
        values["assistant_target"].append(rendered.assistant_target)
        contents.append(rendered.contents[-2:].reshape(-1))
        text_inside.append(record.text == record.messages[-2].content)
        for name, role, content in (("text_view", "user", record.text), ("code_view", "assistant", record.code)):
            values[name].append(np.array(render_view(tokenizer, role, content), np.int32))
    np.save(directory / "contents.npy", np.array(contents, np.int32))
    np.save(directory / "text_inside.npy", np.array(text_inside, np.bool_))
    for name, arrays in values.items():
        np.save(directory / f"{name}.npy", np.concatenate(arrays))
        if name in RAGGED:
            offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
            np.save(directory / f"{name}_offsets.npy", offsets.astype(np.int64))
