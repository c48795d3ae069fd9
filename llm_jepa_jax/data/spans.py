# SPDX-License-Identifier: Apache-2.0
"""Spans of semantic tube prediction: which tokens they may take, and how they are drawn.

A text of n tokens is an example's user content and assistant content one behind the other; plain text has only the
first. A span takes tokens `start`
to `end - 1` of them, at least one and never all. It is drawn from (seed, epoch, example), so a resumed run draws it
again.
"""

import numpy as np

from llm_jepa_jax.batch import CODE_BEFORE, CODE_END, USER_BEFORE, USER_END
from llm_jepa_jax.data.draws import below
from llm_jepa_jax.objective_config import StpConfig

_STREAM = 1000
"""The first of a draw's streams; each attempt takes two."""


def content_points(contents_Nx4: np.ndarray, stp: StpConfig) -> np.ndarray:
    """int [N, 4]: `TokenizedCorpus.contents` under the configuration.

    With `across_turns` the assistant's content begins where the user's ends. With `whole_conversation` the user's
    begins behind the first token; in the mask modes, which encode the text anew, with it.
    """
    points_Nx4 = contents_Nx4.copy() if stp.across_turns or stp.whole_conversation else contents_Nx4
    if stp.across_turns:
        points_Nx4[:, CODE_BEFORE] = points_Nx4[:, USER_END]
    if stp.whole_conversation:
        points_Nx4[:, USER_BEFORE] = -1 if stp.adds_segments else 0
    return points_Nx4


def text_lengths(points_Nx4: np.ndarray) -> np.ndarray:
    """int64 [N]: tokens of each text."""
    user_N = points_Nx4[..., USER_END] - points_Nx4[..., USER_BEFORE]
    return (user_N + points_Nx4[..., CODE_END] - points_Nx4[..., CODE_BEFORE]).astype(np.int64)


def draw_spans(stp: StpConfig, seed: int, epoch: int, points_Nx4: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
    """int32 [N, J, 2]: (start, end) of each of J = `stp.draws` spans this epoch of the examples with these ids.

    (0, 0) where a text is too short, or where the mode draws none: `mean` and `curvature`. `e2e` takes the assistant's
    content.
    """
    length_N = text_lengths(points_Nx4)
    if stp.mode == "e2e":
        user_N = points_Nx4[:, USER_END] - points_Nx4[:, USER_BEFORE]
        return np.stack([user_N, length_N], axis=-1)[:, None].astype(np.int32)
    spans_NxJx2 = np.zeros((len(length_N), stp.draws, 2), np.int32)
    long_enough = np.flatnonzero(length_N >= 2)
    if stp.mode in ("mean", "curvature") or not len(long_enough):
        return spans_NxJx2
    index_M = (ids_N[long_enough, None] * stp.draws + np.arange(stp.draws)).reshape(-1)
    draw = {"start_then_end": _start_then_end, "both": _both, "uniform": _uniform}[stp.draw]
    start_M, end_M = draw(stp, np.repeat(length_N[long_enough], stp.draws), seed, epoch, index_M)
    spans_NxJx2[long_enough] = np.stack([start_M, end_M], axis=-1).reshape(-1, stp.draws, 2)
    return spans_NxJx2


def _start_then_end(
    stp: StpConfig, length_M: np.ndarray, seed: int, epoch: int, index_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Start uniform, then the end uniform behind it (the published default: short spans, late ones most)."""
    start_M = np.zeros_like(length_M) if stp.from_start else below(length_M, seed, epoch, _STREAM, index_M)
    last_M = np.minimum(length_M, start_M + stp.max_length) if stp.max_length else length_M
    last_M = np.where((start_M == 0) & (last_M == length_M), length_M - 1, last_M)
    return start_M, start_M + 1 + below(last_M - start_M, seed, epoch, _STREAM + 1, index_M)


def _both(
    stp: StpConfig, length_M: np.ndarray, seed: int, epoch: int, index_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Two uniform ends, drawn again while they make no span; a span that is too long is cut at its end."""
    start_M, end_M = np.zeros_like(length_M), np.zeros_like(length_M)
    left, attempt = np.arange(len(length_M)), 0
    while len(left):
        length, index = length_M[left], index_M[left]
        first = below(length, seed, epoch, _STREAM + 2 * attempt, index)
        second = 1 + below(length, seed, epoch, _STREAM + 2 * attempt + 1, index)
        start = np.zeros_like(first) if stp.from_start else np.minimum(first, second)
        end = np.maximum(first, second)
        end = np.minimum(end, start + stp.max_length) if stp.max_length else end
        start_M[left], end_M[left] = start, end
        left, attempt = left[(start == end) | (end - start == length)], attempt + 1
    return start_M, end_M


def _uniform(
    stp: StpConfig, length_M: np.ndarray, seed: int, epoch: int, index_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Every allowed span with equal probability."""
    most_M = np.minimum(stp.max_length, length_M - 1) if stp.max_length else length_M - 1
    if stp.from_start:
        return np.zeros_like(length_M), 1 + below(most_M, seed, epoch, _STREAM + 1, index_M)

    def shorter(size_M: np.ndarray) -> np.ndarray:
        """Spans of at most so many tokens."""
        return size_M * length_M - size_M * (size_M - 1) // 2

    rank_M = below(shorter(most_M), seed, epoch, _STREAM, index_M)
    twice_M = 2.0 * length_M + 1.0
    size_M = np.ceil((twice_M - np.sqrt(twice_M**2 - 8.0 * (rank_M + 1))) / 2).astype(np.int64)
    size_M = size_M + (shorter(size_M) <= rank_M) - (shorter(size_M - 1) > rank_M)  # the root is rounded
    start_M = rank_M - shorter(size_M - 1)
    return start_M, start_M + size_M


def has_answer(points_Nx4: np.ndarray) -> np.ndarray:
    """bool [N]: the text has an assistant's content, which `e2e` and `mean` compare with the user's."""
    return points_Nx4[..., CODE_END] > points_Nx4[..., CODE_BEFORE]


def span_weights(stp: StpConfig, spans_Jx2: np.ndarray, points_4: np.ndarray) -> np.ndarray:
    """float32 [J]: weight of each span of a text; 0 where there is no term."""
    taken_J = (spans_Jx2[:, 1] - spans_Jx2[:, 0]).astype(np.float64)
    if stp.mode in ("mean", "curvature"):
        return np.full(len(taken_J), stp.mode == "curvature" or has_answer(points_4), np.float32)
    rest_J = text_lengths(points_4) - taken_J
    if stp.length_weighting == "cosine":
        weight_J = 2.0 * rest_J * taken_J / (rest_J**2 + taken_J**2)
    elif stp.length_weighting == "jaccard":
        weight_J = 1.0 - np.abs(rest_J - taken_J) / (rest_J + taken_J)
    else:
        weight_J = np.ones_like(taken_J)
    return np.where(taken_J > 0, weight_J, 0.0).astype(np.float32)


def span_points(points_4: np.ndarray, spans_Jx2: np.ndarray) -> np.ndarray:
    """int64 [J, 6]: the columns of `Batch.span_points`, as places of the conversation."""
    user = points_4[USER_END] - points_4[USER_BEFORE]
    places_Jx2 = np.where(spans_Jx2 < user, points_4[USER_BEFORE] + spans_Jx2, points_4[CODE_BEFORE] + spans_Jx2 - user)
    return np.concatenate([np.broadcast_to(points_4, (len(spans_Jx2), 4)), places_Jx2], axis=1)


def masked_texts(
    stp: StpConfig, conversation: np.ndarray, points_4: np.ndarray, span_2: np.ndarray, mask_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """The text without a span, and what it is compared with: the span alone, or with `mask_recover` the whole text.

    The text reaches from the user's content to the end of the assistant's, what lies between them included; the span
    takes content only. No role or beginning token comes before it.
    """
    user = np.arange(points_4[USER_BEFORE] + 1, points_4[USER_END] + 1)
    places = np.concatenate([user, np.arange(points_4[CODE_BEFORE] + 1, points_4[CODE_END] + 1)])
    taken = places[span_2[0] : span_2[1]]
    masked = conversation.copy()
    masked[taken] = mask_id
    whole = slice(points_4[USER_BEFORE] + 1, points_4[CODE_END] + 1)
    return masked[whole], conversation[whole] if stp.mode == "mask_recover" else conversation[taken]


def masked_tokens(stp: StpConfig, points_Nx4: np.ndarray, spans_NxJx2: np.ndarray | None = None) -> np.ndarray:
    """int64 [N]: tokens that the mask modes add to each example; the most they can add without `spans`."""
    if not stp.weight or not stp.adds_segments:
        return np.zeros(len(points_Nx4), np.int64)
    whole_N = points_Nx4[:, CODE_END] - points_Nx4[:, USER_BEFORE]
    if stp.mode == "mask_recover":
        added_N = 2 * whole_N
    elif spans_NxJx2 is None:
        added_N = whole_N + text_lengths(points_Nx4) - 1
    else:
        added_N = whole_N + spans_NxJx2[:, 0, 1] - spans_NxJx2[:, 0, 0]
    return np.where(text_lengths(points_Nx4) >= 2, added_N, 0)
