# SPDX-License-Identifier: Apache-2.0
"""Planned rows to arrays: the only place that writes segment ids, positions and pointers."""

import dataclasses

import numpy as np

from llm_jepa_jax.batch import SPAN_BEFORE, SPAN_END, RowShape, empty_rows
from llm_jepa_jax.config import Config
from llm_jepa_jax.data.indexed import Corpus
from llm_jepa_jax.data.packing import Plan
from llm_jepa_jax.data.spans import masked_texts, span_points, span_weights
from llm_jepa_jax.data.views import VIEWS, Costs
from llm_jepa_jax.text.chat import DOCUMENT_HEADER, ViewTokens

Row = dict[str, np.ndarray]
End = tuple[int, int]
"""The next free place of a row, and the number of its last segment."""


@dataclasses.dataclass(frozen=True)
class _Pair:
    """An example's pair as its tokens say it."""

    tokens: dict[str, np.ndarray]
    """Of each view as a segment of its own, header and content."""
    headers: dict[str, int]
    """Tokens before the content of each."""
    text_places: tuple[int, int]
    """First and last place of the text view inside the conversation."""


class RowBuilder:
    """Builds rows of one corpus under one objective and layout."""

    def __init__(self, corpus: Corpus, config: Config, parts: ViewTokens, mask_id: int, costs: Costs):
        """`parts` belong to views, `mask_id` stands for a token taken out, `costs` say what is drawn."""
        self._corpus, self._objective = corpus, config.objective
        self._shared = config.data.layout == "shared"
        self._parts, self._mask_id, self._costs = parts, mask_id, costs

    def __call__(self, plan: Plan, num_rows: int, shape: RowShape) -> Row:
        """The plan's rows, and rows of padding behind them up to `num_rows`; arrays as in `Batch`."""
        rows = empty_rows(num_rows, shape)
        for number in range(len(plan)):
            row = {name: array[number, ...] for name, array in rows.items()}  # views: writing fills the arrays
            self._fill(row, plan, slice(plan.offsets[number], plan.offsets[number + 1]))
        return rows

    def is_text(self, examples: np.ndarray) -> np.ndarray:
        """bool [n]: which examples are plain text."""
        return self._corpus.texts.lengths(examples) > 0

    def _fill(self, row: Row, plan: Plan, members: slice) -> None:
        place = segment = target = pair = span = 0
        examples, pairs = plan.examples[members].tolist(), plan.pairs[members].tolist()
        for example, num_pairs, drawn_Kx2 in zip(examples, pairs, plan.drawn[members], strict=True):
            cut_2x2, spans_Jx2 = np.split(drawn_Kx2, [self._costs.num_cuts])
            start, tokens = place, self._corpus.get("conversation", example)
            indices = start + self._target_offsets(example, len(tokens))
            place, segment = _put(row, tokens, (place, segment))
            slots = slice(target, target + len(indices))
            row["target_index"][slots] = indices
            row["targets"][slots] = row["tokens"][indices + 1]
            row["target_weight"][slots] = 1.0
            target += len(indices)
            for number in range(num_pairs):
                views = self._pair(example, number, cut_2x2)
                place, segment = self._put_pair(row, pair, views, start, (place, segment))
                pair += 1
            if len(spans_Jx2):
                slots = slice(span, span + len(spans_Jx2))
                place, segment = self._put_spans(row, slots, example, start, (place, segment), spans_Jx2)
                span += len(spans_Jx2)
        row["num_examples"][...] = len(examples)

    def _pair(self, example: int, number: int, cut_2x2: np.ndarray) -> _Pair:
        """One of an example's pairs: of plain text the one that is cut from it."""
        if not cut_2x2.any():
            pair = int(self._corpus.pair_offsets[example]) + number
            tokens = {view: self._corpus.get(f"{view}_view", pair) for view in VIEWS}
            headers = dict(zip(VIEWS, self._corpus.view_headers[pair].tolist(), strict=True))
            return _Pair(tokens, headers, tuple(self._corpus.text_places[pair].tolist()))
        text, (start, end) = self._corpus.get("conversation", example), cut_2x2[0].tolist()
        spans = [text[DOCUMENT_HEADER + first : DOCUMENT_HEADER + last] for first, last in cut_2x2.tolist()]
        tokens = {view: np.concatenate([text[:1], span]) for view, span in zip(VIEWS, spans, strict=True)}
        return _Pair(tokens, dict.fromkeys(VIEWS, DOCUMENT_HEADER), (start + 1 if start else 0, end))

    def _put_pair(self, row: Row, pair: int, views: _Pair, start: int, end: End) -> End:
        """Lays a pair's views behind its conversation, which begins at `start`, and points to them.

        In the shared layout the text view is read inside the conversation: if it predicts, its predictor tokens are a
        branch there.
        """
        source, offset = self._objective.jepa.source, self._objective.jepa.view_end_offset
        for view in VIEWS:
            predicts = view == source
            if view == "text" and self._shared:
                first, last = self._read_inside(row, pair, views.text_places, start, predicts)
            else:
                parts, tokens = self._parts, views.tokens[view]
                tokens = parts.predicting(tokens, views.headers[view]) if predicts else parts.predicted(tokens)
                first, end = end[0], _put(row, tokens, end)
                last = end[0] - 1 - offset
            name = "predictor" if predicts else "code"
            row[f"{name}_start"][pair], row[f"{name}_index"][pair] = first, last
        row["pair_weight"][pair] = 1.0
        return end

    def _read_inside(self, row: Row, pair: int, places: tuple[int, int], start: int, predicts: bool) -> tuple[int, int]:
        """First and last place of the text view inside the conversation at `start`, its branch hung there if any."""
        offset, branch = self._objective.jepa.view_end_offset, self._parts.branch if predicts else np.zeros(0, np.int32)
        first, text_end = start + places[0], start + places[1]
        row["branch_end"][pair] = text_end if predicts else 0
        slot = len(row["segments"]) + pair * len(branch)
        row["tokens"][slot : slot + len(branch)] = branch
        row["positions"][slot : slot + len(branch)] = places[1] + 1 + np.arange(len(branch))
        if not len(branch):
            end = self._parts.end if predicts else self._parts.predicted_end
            return first, text_end + len(end) - offset
        return first, slot + len(branch) - 1 - offset if offset < len(branch) else text_end + len(branch) - offset

    def _put_spans(self, row: Row, slots: slice, example: int, start: int, end: End, spans_Jx2: np.ndarray) -> End:
        """Points to an example's spans; in the mask modes lays their texts behind it."""
        stp, points_4 = self._objective.stp, self._costs.points_Nx4[example]
        weights_J = span_weights(stp, spans_Jx2, points_4)
        row["span_weight"][slots] = weights_J
        if not stp.adds_segments:
            row["span_points"][slots] = np.where(weights_J[:, None] > 0, start + span_points(points_4, spans_Jx2), 0)
        elif weights_J[0]:
            texts = masked_texts(stp, self._corpus.get("conversation", example), points_4, spans_Jx2[0], self._mask_id)
            for column, tokens in zip((SPAN_BEFORE, SPAN_END), texts, strict=True):
                end = _put(row, tokens, end)
                row["span_points"][slots.start, column] = end[0] - 1
        return end

    def _target_offsets(self, example: int, length: int) -> np.ndarray:
        """Places of the conversation whose next token is a target."""
        if self._objective.ntp.targets == "all":
            return np.arange(length - 1)
        return np.flatnonzero(self._corpus.get("assistant_target", example)) - 1


def _put(row: Row, tokens: np.ndarray, end: End) -> End:
    """Lays a segment behind the others."""
    place, segment = end
    stop = place + len(tokens)
    row["tokens"][place:stop] = tokens
    row["positions"][place:stop] = np.arange(len(tokens))
    row["segments"][place:stop] = segment + 1
    return stop, segment + 1
