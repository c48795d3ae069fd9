# SPDX-License-Identifier: Apache-2.0
"""One record as token ids: what the corpus in the cache and shards are both made of."""

import dataclasses

import numpy as np

from llm_jepa_jax.data.cuts import sentence_bounds
from llm_jepa_jax.data.records import Record
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.chat import render, render_document, render_view
from llm_jepa_jax.text.interface import Tokenizer

VERSION = "6"
"""Changes with what is kept of a record, or the rendering of a conversation."""


@dataclasses.dataclass(frozen=True)
class TokenizedRecord:
    """A record of n tokens with q pairs."""

    conversation: np.ndarray
    """int32 [n]: token ids, of plain text too."""
    assistant_target: np.ndarray
    """bool [n]: as in `chat.Rendered`."""
    sentences: np.ndarray
    """int32: of plain text, as `cuts.sentence_bounds`; empty for a conversation."""
    contents: np.ndarray
    """int32 [4]: as `TokenizedCorpus.contents`."""
    text_places: np.ndarray
    """int32 [q, 2]: as `TokenizedCorpus.text_places`."""
    view_headers: np.ndarray
    """int32 [q, 2]: as `TokenizedCorpus.view_headers`."""
    views: dict[str, list[np.ndarray]]
    """`text` and `code`: int32 token ids of each pair's, without predictor tokens or end-of-turn token."""


def tokenize_record(record: Record, tokenizer: Tokenizer, which: str, where: str) -> TokenizedRecord:
    """The tokens of a record and of its pairs under `data.pairs`.

    Raises:
        UserError: the chat template does not fit it; with `where` it is.
    """
    pairs = record.pairs(which)
    try:
        if record.messages:
            rendered, bounds = render(tokenizer, record.messages), []
        else:
            ids, places = tokenizer.encode_with_places(record.document)
            rendered, bounds = render_document(tokenizer, ids), sentence_bounds(record.document, places)
        texts = [render_view(tokenizer, "user", pair.text) for pair in pairs]
        codes = [render_view(tokenizer, "assistant", pair.code) for pair in pairs]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    text_places = [
        (rendered.starts[pair.turn], rendered.contents[pair.turn][1]) if pair.turn >= 0 else (-1, -1) for pair in pairs
    ]
    view_headers = [(text.header, code.header) for text, code in zip(texts, codes, strict=True)]
    return TokenizedRecord(
        rendered.tokens,
        rendered.assistant_target,
        np.array(bounds, np.int32),
        rendered.contents[-2:].reshape(-1),
        np.array(text_places, np.int32).reshape(-1, 2),
        np.array(view_headers, np.int32).reshape(-1, 2),
        {name: [np.array(v.tokens, np.int32) for v in views] for name, views in (("text", texts), ("code", codes))},
    )
