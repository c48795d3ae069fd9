# SPDX-License-Identifier: Apache-2.0
"""The array contract between the data pipeline and the jitted step."""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np

SHORTEST_ROW, ROW_MULTIPLE = 64, 32
USER_BEFORE, USER_END, CODE_BEFORE, CODE_END, SPAN_BEFORE, SPAN_END = range(6)
"""Columns of `Batch.span_points`."""
NUM_POINTS = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows. R rows, L row length, M target slots, P pair slots, S span slots; int32 unless said.

    All indices are absolute within their row. An unused slot has weight 0 and index 0. Segment 0 is padding; tokens
    see only earlier tokens of their own segment. `positions` restart at 0 in every segment.

    T is L, or in the `shared` layout L + P·b: behind the trunk, each pair has a branch of b tokens, its predictor
    tokens and, with `jepa.view_end=turn`, an end-of-turn token. They see the trunk up to their pair's `branch_end`, and
    the branch's earlier tokens; their positions go on from there.
    """

    tokens: Any
    """[R, T] token ids; 0 at padding."""
    positions: Any
    """[R, T] position of each token within its segment."""
    segments: Any
    """[R, L] segment of each token, from 1 up in a row; 0 = padding."""
    branch_end: Any
    """[R, P] last place of the trunk that a pair's branch sees; 0 in layouts without branches."""
    target_index: Any
    """[R, M] place whose next token is predicted."""
    targets: Any
    """[R, M] the token to predict there."""
    target_weight: Any
    """[R, M] float32, 1 for a used slot."""
    predictor_index: Any
    """[R, P] place of the last hidden state of the view that predicts, its predictor tokens included: the text view,
    or the code view with `jepa.direction=code_to_text`."""
    predictor_start: Any
    """[R, P] place of that view's first token."""
    code_index: Any
    """[R, P] place of the last hidden state of the view that is predicted: the code view, or the text view with
    `jepa.direction=code_to_text`."""
    code_start: Any
    """[R, P] place of that view's first token."""
    pair_weight: Any
    """[R, P] float32, 1 for a used slot."""
    span_points: Any
    """[R, S, 6] places that a span is made of; what each is says `objectives.stp`."""
    span_weight: Any
    """[R, S] float32, weight of the span; 0 for a free slot."""
    num_examples: Any
    """[R] examples whose conversation lies in the row."""


FIELDS = tuple(field.name for field in dataclasses.fields(Batch))
FLOAT_FIELDS = ("target_weight", "pair_weight", "span_weight")


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static sizes of a row."""

    length: int
    target_slots: int
    pair_slots: int
    longest_segment: int = 0
    """No segment has more tokens; 0: not known. Attention need not look further back."""
    branch: int = 0
    """Tokens of each pair slot's branch behind the row."""
    most_examples: int = 0
    """Examples that a row may hold; 0: any number."""
    span_slots: int = 0

    @property
    def width(self) -> int:
        """Tokens of a row and its branches."""
        return self.length + self.pair_slots * self.branch


@dataclasses.dataclass(frozen=True)
class StepShape:
    """One kind of steps: the static sizes of a compiled step. All its rows have one shape."""

    rows: int
    """Rows of a step, over all processes."""
    row: RowShape

    def __str__(self) -> str:
        views = "views" if self.row.pair_slots else "no views"
        return f"{self.rows} rows of {self.row.length} tokens, {views}"


def row_lengths(longest: int) -> list[int]:
    """All row lengths that `data.row_buckets` can choose from: the longest, its half, its quarter, …"""
    lengths = [longest]
    while lengths[-1] % (2 * ROW_MULTIPLE) == 0 and lengths[-1] // 2 >= SHORTEST_ROW:
        lengths.append(lengths[-1] // 2)
    return lengths


def empty_rows(num_rows: int, shape: RowShape) -> dict[str, np.ndarray]:
    """Rows of padding as writable arrays [R, …]: the fields of `Batch` by name."""
    sizes = {
        "target": (shape.target_slots,), "pair": (shape.pair_slots,), "token": (shape.width,), "trunk": (shape.length,),
        "span": (shape.span_slots,), "points": (shape.span_slots, NUM_POINTS),
    }  # fmt: skip
    of = {
        "tokens": "token", "positions": "token", "segments": "trunk", "branch_end": "pair",
        "target_index": "target", "targets": "target", "target_weight": "target",
        "predictor_index": "pair", "predictor_start": "pair", "code_index": "pair", "code_start": "pair",
        "pair_weight": "pair", "span_points": "points", "span_weight": "span",
    }  # fmt: skip
    rows = {
        name: np.zeros((num_rows, *sizes[kind]), np.float32 if name in FLOAT_FIELDS else np.int32)
        for name, kind in of.items()
    }
    return rows | {"num_examples": np.zeros(num_rows, np.int32)}


def abstract_batch(num_rows: int, shape: RowShape) -> Batch:
    """The batch as `jax.ShapeDtypeStruct`s: what ahead-of-time compilation and sharding need."""
    rows = empty_rows(0, shape)
    return Batch(**{n: jax.ShapeDtypeStruct((num_rows, *rows[n].shape[1:]), rows[n].dtype) for n in FIELDS})


def check_batch(batch: Batch, num_rows: int, shape: RowShape) -> None:
    """Holds the batch to the contract's shapes and types.

    Raises:
        AssertionError: a field has another shape or type.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch), abstract_batch(num_rows, shape)
    )
