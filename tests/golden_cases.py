# SPDX-License-Identifier: Apache-2.0
"""The reference's recorded runs as ours: a configuration made from the run's name, and a batch from its arrays.

A row is a conversation, then up to two views, each in its own third: three passes in one. In the additive mode both
views lie in the second third, packed. Indices and positions are those of the reference.
"""

import dataclasses
import re

import numpy as np

from llm_jepa_jax.batch import CODE_BEFORE, SPAN_BEFORE, SPAN_END, USER_BEFORE, USER_END, Batch
from llm_jepa_jax.data.spans import content_points, draw_spans, masked_texts, span_points, span_weights, text_lengths
from llm_jepa_jax.objective_config import JepaConfig, NtpConfig, ObjectiveConfig, StpConfig

VIEWS = ("user", "assistant")
"""The reference calls the view that predicts `user`: with its `--reverse_pred` that is the code view."""
MASK_ID, END_OF_TURN = 3, 6
"""Ids of the reference's tokenizer."""
MULTIPLE = 32
TWO_VIEWS = re.compile(r"(k\d_f\d_r\d)_(three|add)_lt(-\d+)_(cosine|l2|mse|infonce)")
STP_TWO_VIEWS = re.compile(r"(avg_encoding|two_view_three|two_view_add)_k(\d)_lt(-\d+)(\+lp)?")
WEIGHTINGS = {"cosine_like": "cosine", "jaccard_like": "jaccard"}


@dataclasses.dataclass(frozen=True)
class TwoViews:
    """A run that compares views."""

    views: str
    """Which arrays hold the view rows."""
    additive: bool
    last_token: int
    jepa: JepaConfig


def two_views(name: str) -> TwoViews | None:
    """The run of a name without its data set; none if it compares no views."""
    if found := TWO_VIEWS.fullmatch(name):
        views, mode, last_token, distance = found.groups()
        return TwoViews(views, mode == "add", int(last_token), JepaConfig(weight=1.0, distance=distance))
    if found := STP_TWO_VIEWS.fullmatch(name):
        kind, predictors, last_token, linear = found.groups()
        pooling = "mean" if kind == "avg_encoding" else "last"
        jepa = JepaConfig(weight=1.0, pooling=pooling, linear_predictor=bool(linear))
        return TwoViews(f"k{predictors}_f0_r0", kind == "two_view_add", int(last_token), jepa)
    return None


def stp_config(name: str, num_draws: int) -> StpConfig:
    """The configuration of an STP run's name without its data set; `num_draws` is how many spans a row has.

    The reference's `curvature_sign` changes nothing, and its mse knows no length weights.
    """
    base, distance = name.removesuffix("+lp"), "mse" if "_mse" in name else "cosine"
    mode = next(m for m in ("random_span", "e2e", "mean", "curvature") if base.startswith(m))
    if "_mask" in base:
        mode = "mask_recover" if "_recover" in base else "mask"
    weighting = next((ours for theirs, ours in WEIGHTINGS.items() if theirs in base), "none")
    layer = re.search(r"_layer(-\d+)", base)
    return StpConfig(
        weight=1.0, mode=mode, distance=distance, linear_predictor=name.endswith("+lp"), draws=num_draws,
        across_turns="_e2e" in base, whole_conversation="_all" in base, from_start="_zero" in base,
        length_weighting=weighting if distance == "cosine" else "none",
        layer=int(layer[1]) if layer else -1, final_norm=not layer or layer[1] == "-1",
    )  # fmt: skip


def objective(**terms: JepaConfig | StpConfig) -> ObjectiveConfig:
    """One term, and next-token prediction that counts from the second step on: one compiled function for both."""
    ntp = NtpConfig(targets="all", weight=1.0, schedule="linear", schedule_steps=2)
    return ObjectiveConfig(ntp=ntp, **({"jepa": JepaConfig(weight=0.0)} | terms), head_chunk=50)


def conversations(golden: dict, dataset: str, cut: int = 0) -> dict[str, np.ndarray]:
    """Rows with the conversation in their first third. The additive mode's mask leaves out the last `cut` tokens."""
    tokens, mask = (golden[f"{dataset}/{n}"].astype(np.int32) for n in ("input_ids", "attention_mask"))
    rows, length = tokens.shape
    labels, blank = golden[f"{dataset}/labels"], np.zeros((rows, length), np.int32)
    columns = np.arange(length, dtype=np.int32)
    mask = mask * (columns < mask.sum(1, keepdims=True) - cut)
    zeros = np.zeros((rows, 1), np.int32)
    return {
        "tokens": np.concatenate([tokens, blank, blank], axis=1),
        "positions": np.tile(columns, (rows, 3)),
        "segments": np.concatenate([mask, blank, blank], axis=1),
        "target_index": np.tile(columns[:-1], (rows, 1)),
        "targets": tokens[:, 1:],
        "target_weight": (labels[:, 1:] >= 0).astype(np.float32),
        **dict.fromkeys(("branch_end", "predictor_index", "predictor_start", "code_index", "code_start"), zeros),
        "pair_weight": zeros.astype(np.float32),
        "span_points": np.zeros((rows, 0, 6), np.int32),
        "span_weight": np.zeros((rows, 0), np.float32),
        "num_examples": np.ones(rows, np.int32),
    }


def two_views_batch(golden: dict, dataset: str, run: TwoViews, expected: dict) -> Batch:
    """The rows of a run that compares views; the places picked must be the recorded ones."""
    fields = conversations(golden, dataset, cut=-1 - run.last_token if run.additive else 0)
    ids, masks = (
        [golden[f"{dataset}/{run.views}/{name}_{view}"].astype(np.int32) for view in VIEWS]
        for name in ("input_ids", "attention_mask")
    )
    length, rows = ids[0].shape[1], np.arange(len(ids[0]))
    for row in rows if run.additive else ():
        user, assistant = (
            view[row, : mask[row].sum() + run.last_token + 1] for view, mask in zip(ids, masks, strict=True)
        )
        packed = slice(length, length + len(user) + len(assistant))
        fields["tokens"][row, packed] = np.concatenate([user, assistant])
        fields["segments"][row, packed] = np.repeat([2, 3], [len(user), len(assistant)])
    if not run.additive:
        fields["tokens"][:, length:] = np.concatenate(ids, axis=1)
        fields["segments"][:, length:] = np.concatenate([masks[0] * 2, masks[1] * 3], axis=1)
    starts = [np.argmax(fields["segments"] == segment, axis=1) for segment in (2, 3)]
    cut = 0 if run.additive else 1 + run.last_token
    ends = [start + (fields["segments"] == s).sum(1) - 1 + cut for s, start in zip((2, 3), starts, strict=True)]
    for end, view in zip(ends, VIEWS, strict=True):
        third = length if run.additive or view == "user" else 2 * length
        np.testing.assert_array_equal(end - third, expected[f"index_{view}"])
    names = ("predictor_start", "code_start", "predictor_index", "code_index")
    fields |= {name: place[:, None].astype(np.int32) for name, place in zip(names, starts + ends, strict=True)}
    return cropped(fields | {"pair_weight": np.ones((len(rows), 1), np.float32)})


def spans_of(golden: dict, dataset: str, stp: StpConfig, draws: list | None) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the texts [N, 4], and spans [N, J, 2]: the recorded draws, of texts as long as recorded, or ours where
    the mode draws none.
    """
    contents = np.concatenate([golden[f"{dataset}/{view}_start_end"] for view in VIEWS], axis=1)
    points = content_points(contents, stp)
    if not draws:
        return points, draw_spans(stp, 0, 0, points, np.arange(len(points)))
    draws = np.array(draws).reshape(len(points), stp.draws, 3)
    np.testing.assert_array_equal(draws[..., 2], np.tile(text_lengths(points)[:, None], stp.draws))
    return points, draws[..., :2]


def stp_batch(golden: dict, dataset: str, name: str, stp: StpConfig, expected: dict) -> Batch:
    """The rows of an STP run; span weights must be the recorded ones."""
    fields = conversations(golden, dataset)
    points, spans = spans_of(golden, dataset, stp, expected.get("draws_start_end_full"))
    weights = [span_weights(stp, row, point) for row, point in zip(spans, points, strict=True)]
    if "weights" in expected and stp.distance == "cosine":
        np.testing.assert_allclose(np.concatenate(weights), expected["weights"], rtol=1e-6)
    fields["span_weight"] = np.stack(weights)
    places = [span_points(row, row_spans) for row, row_spans in zip(points, spans, strict=True)]
    fields["span_points"] = np.stack(places).astype(np.int32)
    if stp.adds_segments:
        for row in range(len(points)):
            texts = masked_texts(stp, fields["tokens"][row], points[row], spans[row, 0], MASK_ID)
            _put_masked(fields, row, recorded_texts(golden, f"{dataset}/stp/{name}", row))
            for ours, theirs in zip(texts, recorded_texts(golden, f"{dataset}/stp/{name}", row), strict=True):
                _check_masked(ours, theirs, stp, points[row], spans[row, 0])
    return cropped(fields)


def recorded_texts(golden: dict, run: str, row: int) -> list[np.ndarray]:
    """The two texts that a mask run encodes."""
    sizes = [int(golden[f"{run}/view_{view}_len"][row]) for view in VIEWS]
    return np.split(golden[f"{run}/packed_input_ids"][row, : sum(sizes)], sizes[:1])


def _check_masked(ours: np.ndarray, theirs: np.ndarray, stp: StpConfig, points: np.ndarray, span: np.ndarray) -> None:
    """Ours are the recorded tokens. Behind a span that goes over from the user's content to the assistant's, the
    reference has as many end-of-turn tokens as lie between them.
    """
    user, gap = points[USER_END] - points[USER_BEFORE], points[CODE_BEFORE] - points[USER_END]
    is_span = stp.mode == "mask" and MASK_ID not in theirs
    more = gap if is_span and span[0] < user < span[1] else 0
    np.testing.assert_array_equal(theirs, np.concatenate([ours, np.full(more, END_OF_TURN)]))


def _put_masked(fields: dict[str, np.ndarray], row: int, texts: list[np.ndarray]) -> None:
    """Lays the two texts of a mask run into the row's second third."""
    place = fields["tokens"].shape[1] // 3
    fields["span_points"][row] = 0
    for number, (column, text) in enumerate(zip((SPAN_BEFORE, SPAN_END), texts, strict=True), start=2):
        fields["tokens"][row, place : place + len(text)] = text
        fields["segments"][row, place : place + len(text)] = number
        place += len(text)
        fields["span_points"][row, 0, column] = place - 1


def cropped(fields: dict[str, np.ndarray]) -> Batch:
    """The batch without columns at the end of each third that are padding in all rows."""
    length = fields["tokens"].shape[1] // 3
    used = np.flatnonzero(fields["segments"].reshape(-1, length).any(0))[-1] + 1
    short = -(-used // MULTIPLE) * MULTIPLE
    for name in ("tokens", "positions", "segments"):
        fields[name] = fields[name].reshape(-1, 3, length)[..., :short].reshape(-1, 3 * short)
    assert not fields["target_weight"][:, short - 1 :].any()
    for name in ("target_index", "targets", "target_weight"):
        fields[name] = fields[name][:, : short - 1]
    for name in ("predictor_index", "predictor_start", "code_index", "code_start", "span_points"):
        fields[name] = fields[name] // length * short + fields[name] % length
    return Batch(**fields)
