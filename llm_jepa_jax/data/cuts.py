# SPDX-License-Identifier: Apache-2.0
"""The two views of plain text: neighbouring spans of its tokens, cut anew every epoch.

A cut is [2, 2]: (start, end) of the earlier view's tokens and of the later one's, counted from the text's first token.
The earlier view is the pair's text view, the later one its code view. Cuts are drawn from (seed, epoch, example), so a
resumed run draws them again.
"""

import dataclasses
import re

import numpy as np

from llm_jepa_jax.data.draws import below

_STREAM = 3
"""The first of a cut's two streams."""
SENTENCE_END = re.compile(r"[.!?\n](?=[ \n]|\Z)")
BLANK = re.compile(r"\s*")
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Where the plain texts among N examples can be cut."""

    bounds: np.ndarray
    """int32: of one text after the other, the tokens at which its sentences begin, and its number of tokens."""
    offsets: np.ndarray
    """int64 [N + 1]: where each example's begin in `bounds`; a conversation has none."""

    def lengths(self, of: np.ndarray | slice = ALL) -> np.ndarray:
        """int64 [N]: tokens of the text of each example, or of these; 0 for a conversation."""
        first_N, end_N = self.offsets[:-1][of], self.offsets[1:][of]
        length_N = np.zeros(len(first_N), np.int64)
        texts = np.flatnonzero(end_N > first_N)
        length_N[texts] = self.bounds[end_N[texts] - 1]
        return length_N

    def can_be_cut(self, how: str, of: np.ndarray | slice = ALL) -> np.ndarray:
        """bool [N]: the text has two views under `data.text_views`: two sentences, or else two tokens."""
        return self.offsets[1:][of] - self.offsets[:-1][of] > 2 if how == "sentence" else self.lengths(of) > 1


def sentence_bounds(text: str, places: list[int]) -> list[int]:
    """The tokens at which sentences begin, 0 first, and the number of tokens.

    `places` are the characters that tokens begin with. A sentence ends with `.`, `!`, `?` or a newline before a space,
    a newline or the end of the text. A token that also holds white space behind the end belongs to the sentence; where
    it holds what comes after that too, no cut falls between tokens, and both sentences count as one.
    """
    token_of = {place: token for token, place in reversed(list(enumerate(places)))}
    bounds, begun = [0], 0
    for match in SENTENCE_END.finditer(text):
        end = match.end()
        rest = BLANK.match(text, end).end()  # type: ignore[union-attr]
        if rest == len(text) or not text[begun:end].strip():
            continue
        token = next((token_of[place] for place in range(end, rest + 1) if place in token_of), None)
        if token is not None:
            bounds.append(token)
            begun = end
    return [*bounds, len(places)]


def draw_cuts(how: str, seed: int, epoch: int, texts: Texts, ids_N: np.ndarray) -> np.ndarray:
    """int32 [N, 2, 2]: the two views this epoch under `data.text_views` of these examples' texts; 0 where there are
    none."""
    cuts_Nx2x2 = np.zeros((len(ids_N), 2, 2), np.int32)
    place_N = np.flatnonzero(texts.can_be_cut(how, ids_N))
    index_M = ids_N[place_N]
    if how == "sentence":
        first_M = texts.offsets[index_M]
        inner_M = texts.offsets[index_M + 1] - first_M - 2
        bound_M = first_M + 1 + below(inner_M, seed, epoch, _STREAM, index_M)
        start_M, cut_M, end_M = (texts.bounds[bound_M + step] for step in (-1, 0, 1))
    else:
        length_M = texts.lengths(index_M)
        cut_M = 1 + below(length_M - 1, seed, epoch, _STREAM, index_M)
        start_M, end_M = np.zeros_like(cut_M), length_M
        if how == "adjacent":
            size_M = 1 + below(np.minimum(cut_M, length_M - cut_M), seed, epoch, _STREAM + 1, index_M)
            start_M, end_M = cut_M - size_M, cut_M + size_M
    cuts_Nx2x2[place_N] = np.stack([start_M, cut_M, cut_M, end_M], axis=-1).reshape(-1, 2, 2)
    return cuts_Nx2x2


def most_cut(how: str, texts: Texts) -> np.ndarray:
    """int64 [N, 3]: most tokens that the earlier view, the later view and both together have in any epoch."""
    most_Nx3 = np.zeros((len(texts.offsets) - 1, 3), np.int64)
    index_M = np.flatnonzero(texts.can_be_cut(how))
    length_M = texts.lengths(index_M)
    if how == "continuation":
        most_Nx3[index_M] = np.stack([length_M - 1, length_M - 1, length_M], axis=-1)
    elif how == "adjacent":
        most_Nx3[index_M] = np.stack([length_M // 2, length_M // 2, length_M // 2 * 2], axis=-1)
    elif len(index_M):
        sizes = np.diff(texts.bounds).astype(np.int64)
        first_M, last_M = texts.offsets[index_M], texts.offsets[index_M + 1] - 1
        both = sizes[:-1] + sizes[1:]
        parts = (sizes, first_M, last_M - 1), (sizes, first_M + 1, last_M), (both, first_M, last_M - 1)
        most_Nx3[index_M] = np.stack([_most(*part) for part in parts], axis=-1)
    return most_Nx3


def _most(values: np.ndarray, start_M: np.ndarray, stop_M: np.ndarray) -> np.ndarray:
    """int64 [M]: the largest of the values from each start up to its stop, which lies behind it."""
    between = np.stack([start_M, stop_M], axis=-1).reshape(-1)
    return np.maximum.reduceat(np.append(values, 0), between)[::2]
