# SPDX-License-Identifier: Apache-2.0
"""Planned rows to arrays: the only place that writes segment ids, positions and pointers."""

import numpy as np

from llm_jepa_jax.batch import RowShape, empty_rows
from llm_jepa_jax.config import Config
from llm_jepa_jax.data.corpus import TokenizedCorpus
from llm_jepa_jax.data.packing import Plan
from llm_jepa_jax.text.chat import with_predictors

Row = dict[str, np.ndarray]


class RowBuilder:
    """Builds rows of one corpus under one objective and layout."""

    def __init__(self, corpus: TokenizedCorpus, config: Config, predictor_ids: tuple[int, ...]):
        """`predictor_ids` are the k predictor tokens of the view that predicts, in order."""
        self._corpus, self._targets, self._jepa = corpus, config.objective.ntp.targets, config.objective.jepa
        self._shared = config.data.layout == "shared"
        self._predictors = np.array(predictor_ids, np.int32)

    def __call__(self, plan: Plan, num_rows: int, shape: RowShape) -> Row:
        """The plan's rows, and rows of padding behind them up to `num_rows`; arrays as in `Batch`."""
        rows = empty_rows(num_rows, shape)
        for number in range(len(plan)):
            members = slice(plan.offsets[number], plan.offsets[number + 1])
            row = {name: array[number, ...] for name, array in rows.items()}  # views: writing fills the arrays
            self._fill(row, plan.examples[members].tolist(), plan.pairs[members].tolist())
        return rows

    def _fill(self, row: Row, examples: list[int], pairs: list[bool]) -> None:
        place = segment = target = pair = 0
        for example, with_pair in zip(examples, pairs, strict=True):
            start, tokens = place, self._corpus.get("conversation", example)
            indices = start + self._target_offsets(example, len(tokens))
            place, segment = _put(row, tokens, place, segment)
            slots = slice(target, target + len(indices))
            row["target_index"][slots] = indices
            row["targets"][slots] = row["tokens"][indices + 1]
            row["target_weight"][slots] = 1.0
            target += len(indices)
            if with_pair:
                place, segment = self._put_pair(row, pair, example, start, (place, segment))
                pair += 1
        row["num_examples"][...] = len(examples)

    def _put_pair(self, row: Row, pair: int, example: int, start: int, end: tuple[int, int]) -> tuple[int, int]:
        """Lays an example's views behind its conversation, which begins at `start`, and points to their ends.

        In the shared layout the text view is read inside the conversation: if it predicts, its predictor tokens are a
        branch there.
        """
        ends = {}
        for view in ("text", "code"):
            if view == "text" and self._shared:
                ends[view] = start + int(self._corpus.text_end[example])
                if self._jepa.source == view:
                    ends[view] = self._put_branch(row, pair, start, ends[view])
                continue
            tokens = self._corpus.get(f"{view}_view", example)
            if self._jepa.source == view:
                tokens = with_predictors(tokens, self._predictors, self._jepa.placement)
            end = _put(row, tokens, *end)
            ends[view] = end[0] - 1
        row["predictor_index"][pair] = ends.pop(self._jepa.source)
        (row["code_index"][pair],) = ends.values()
        row["pair_weight"][pair] = 1.0
        return end

    def _put_branch(self, row: Row, pair: int, start: int, text_end: int) -> int:
        """Hangs a pair's predictor tokens off the place `text_end`; returns the place of the last one."""
        row["branch_end"][pair] = text_end
        k, first = len(self._predictors), len(row["segments"]) + pair * len(self._predictors)
        row["tokens"][first : first + k] = self._predictors
        row["positions"][first : first + k] = text_end - start + 1 + np.arange(k)
        return first + k - 1 if k else text_end

    def _target_offsets(self, example: int, length: int) -> np.ndarray:
        """Places of the conversation whose next token is a target."""
        if self._targets == "all":
            return np.arange(length - 1)
        return np.flatnonzero(self._corpus.get("assistant_target", example)) - 1


def _put(row: Row, tokens: np.ndarray, place: int, segment: int) -> tuple[int, int]:
    """Lays a segment at `place`; returns the next place and the segment's number."""
    end = place + len(tokens)
    row["tokens"][place:end] = tokens
    row["positions"][place:end] = np.arange(len(tokens))
    row["segments"][place:end] = segment + 1
    return end, segment + 1
