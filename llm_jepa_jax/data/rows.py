# SPDX-License-Identifier: Apache-2.0
"""One planned row to arrays: the only place that writes segment ids, positions and pointers."""

import numpy as np

from llm_jepa_jax.batch import RowShape, empty_row
from llm_jepa_jax.data.corpus import TokenizedCorpus


class RowBuilder:
    """Builds rows of one corpus under one objective."""

    def __init__(
        self, corpus: TokenizedCorpus, shape: RowShape, targets: str, predictor_ids: tuple[int, ...], shared: bool
    ):
        """`predictor_ids` are the k predictor tokens of a text view, in order; `shared`: on a branch of their own."""
        self._corpus, self.shape, self._targets, self._shared = corpus, shape, targets, shared
        self._predictors = np.array(predictor_ids, np.int32)

    def __call__(self, examples: np.ndarray, pairs: np.ndarray) -> dict[str, np.ndarray]:
        """The row of these example ids, `pairs` saying which bring their views; arrays as in `Batch`, without R."""
        row = empty_row(self.shape)
        place = segment = target = pair = 0
        for example, with_pair in zip(examples.tolist(), pairs.tolist(), strict=True):
            start, tokens = place, self._corpus.get("conversation", example)
            indices = start + self._target_offsets(example, len(tokens))
            place, segment = _put(row, tokens, place, segment)
            slots = slice(target, target + len(indices))
            row["target_index"][slots] = indices
            row["targets"][slots] = row["tokens"][indices + 1]
            row["target_weight"][slots] = 1.0
            target += len(indices)
            if with_pair:
                if self._shared:
                    self._put_branch(row, pair, start, int(self._corpus.text_end[example]))
                else:
                    text = np.concatenate([self._corpus.get("text_view", example), self._predictors])
                    place, segment = _put(row, text, place, segment)
                    row["predictor_index"][pair] = place - 1
                place, segment = _put(row, self._corpus.get("code_view", example), place, segment)
                row["code_index"][pair] = place - 1
                row["pair_weight"][pair] = 1.0
                pair += 1
        row["num_examples"][()] = len(examples)
        return row

    def _put_branch(self, row: dict[str, np.ndarray], pair: int, start: int, text_end: int) -> None:
        """Hangs a pair's predictor tokens off its conversation, which begins at `start`."""
        row["branch_end"][pair] = start + text_end
        k, first = len(self._predictors), self.shape.length + pair * len(self._predictors)
        row["tokens"][first : first + k] = self._predictors
        row["positions"][first : first + k] = text_end + 1 + np.arange(k)
        row["predictor_index"][pair] = first + k - 1 if k else start + text_end

    def _target_offsets(self, example: int, length: int) -> np.ndarray:
        """Places of the conversation whose next token is a target."""
        if self._targets == "all":
            return np.arange(length - 1)
        return np.flatnonzero(self._corpus.get("assistant_target", example)) - 1


def _put(row: dict[str, np.ndarray], tokens: np.ndarray, place: int, segment: int) -> tuple[int, int]:
    """Lays a segment at `place`; returns the next place and the segment's number."""
    end = place + len(tokens)
    row["tokens"][place:end] = tokens
    row["positions"][place:end] = np.arange(len(tokens))
    row["segments"][place:end] = segment + 1
    return end, segment + 1
