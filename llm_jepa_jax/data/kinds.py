# SPDX-License-Identifier: Apache-2.0
"""Kinds of steps: which shapes of rows a run has, which of them an example goes to, and an epoch's rows of each.

A step's rows are all of one kind, and each kind is compiled once. Kinds differ in row length (`data.row_buckets`) and,
with loss dropout by step, in whether their examples bring their pairs.
"""

import copy
import dataclasses
import functools
import math
import operator

import numpy as np

from llm_jepa_jax.batch import RowShape, StepShape, row_lengths
from llm_jepa_jax.config import Config
from llm_jepa_jax.data.packing import Load, Plan, largest_first, load_of, plan_rows, shuffled, slot_sizes
from llm_jepa_jax.data.views import Costs, branch_size, copies, has_pair
from llm_jepa_jax.flops import model_flops

MOST_LENGTHS = 4
"""Row lengths tried where `data.row_buckets` is 0."""
EXAMPLES_A_ROW = 4
"""How many examples of its size a packed row must hold to be an example's: fewer leave gaps."""
SLOT_MARGINS = (1.25, 1.1, 1.35, 1.5)
"""Slots of a packed row that are tried, against the average load of a full one; row lengths are chosen at the first."""
LEAST_SAVING = 0.03
"""Share of an epoch's work that further row lengths must save to be worth compiling."""
WINDOW = 1 << 20
"""Examples that are planned together at most: beyond it fill gains nothing, and a plan takes seconds and memory."""
SAMPLE = 32768
"""Examples that the work of an epoch is estimated from."""


@dataclasses.dataclass(frozen=True)
class Kinds:
    """The kinds of a run's steps, and which one an example is packed into."""

    steps: tuple[StepShape, ...]
    lengths: tuple[int, ...]
    """Row lengths, longest first."""
    by_step: bool
    """Examples with and without pairs are packed apart."""
    packed: bool
    table: np.ndarray
    """int [2, lengths]: the kind of examples that are packed (0), or packed apart for having no pairs (1); -1: none."""

    def of(self, tokens_N: np.ndarray, pairs_N: np.ndarray) -> np.ndarray:
        """int [N]: kind of each example, given the most tokens it can have and how many pairs it has."""
        apart_N = ((pairs_N == 0) & self.by_step).astype(np.int64)
        return self.table[apart_N, self._bucket(tokens_N)]

    def _bucket(self, tokens_N: np.ndarray) -> np.ndarray:
        """int [N]: place in `lengths` of the shortest row that suits each example."""
        least_N = tokens_N * (EXAMPLES_A_ROW if self.packed else 1)
        return sum((least_N <= length for length in self.lengths[1:]), start=np.zeros(len(tokens_N), np.int64))


def make_kinds(config: Config, costs: Costs, weights_N: np.ndarray) -> Kinds:
    """The kinds under a configuration; `weights` are copies of each example an epoch, 0 for what does not fit.

    With `data.row_buckets=0`, the fewest row lengths such that more would save less than 3% of an epoch's work. Slots
    not given are sized to make that work least: more of them cost time in the head, fewer leave rows unfilled.
    """
    data = config.data
    most = 1 if data.target_slots or data.pair_slots else min(MOST_LENGTHS, len(row_lengths(data.row_length)))
    counts = [data.row_buckets] if data.row_buckets else list(range(1, most + 1))
    finest = _finest(config, counts[-1])
    loads, sample = _loads(config, costs, weights_N, finest), _sample(config, weights_N)
    choices = [_with_lengths(config, costs, finest, loads, count, SLOT_MARGINS[0]) for count in counts]
    works = [_epoch_work(config, costs, kinds, sample, whole_steps=True) for kinds in choices]
    best = next(i for i, work in enumerate(works) if min(works[i:]) > (1.0 - LEAST_SAVING) * work)
    if not choices[best].packed:
        return choices[best]
    others = [_with_lengths(config, costs, finest, loads, counts[best], margin) for margin in SLOT_MARGINS[1:]]
    return min(choices[best], *others, key=lambda kinds: _epoch_work(config, costs, kinds, sample, whole_steps=False))


def _finest(config: Config, count: int) -> Kinds:
    """A kind for each of `count` row lengths, with and without pairs apart where they are; no shapes yet."""
    data, by_step = config.data, config.objective.jepa.dropout_by == "step"
    lengths = tuple(row_lengths(data.row_length)[:count])
    return Kinds((), lengths, by_step, data.layout != "padded", np.arange(2 * len(lengths)).reshape(2, -1))


def _loads(config: Config, costs: Costs, weights_N: np.ndarray, finest: Kinds) -> dict[tuple[int, int], Load]:
    """Load of the first epoch, by (apart, bucket), of every finest kind that an example can come to."""
    jepa = config.objective.jepa
    share = (1.0 - jepa.dropout) if jepa.weight else 0.0
    used = np.flatnonzero(weights_N)
    loads: dict[tuple[int, int], Load] = {}
    for ids in np.array_split(used, -(-len(used) // WINDOW)):
        drawn_NxKx2, targets_N = costs.draw(config.seed, 0, ids), costs.targets_N[ids]
        for keep, part in ((1, share), (0, 1.0 - share)):
            if not part:
                continue
            pairs_N, weight_N = costs.pairs_N[ids] * keep, weights_N[ids] * part
            kind_N = finest.of(costs.tokens(pairs_N, examples=ids), pairs_N)
            tokens_N = costs.tokens(pairs_N, drawn_NxKx2, ids)
            longest_N = (costs.longest_N if keep else costs.conversation_N)[ids]
            for kind in np.flatnonzero(np.bincount(kind_N)).tolist():
                of, place = kind_N == kind, divmod(kind, len(finest.lengths))
                found = load_of(tokens_N[of], targets_N[of], pairs_N[of], longest_N[of], weight_N[of])
                loads[place] = loads[place] + found if place in loads else found
    return loads


def _with_lengths(
    config: Config, costs: Costs, finest: Kinds, loads: dict[tuple[int, int], Load], count: int, margin: float
) -> Kinds:
    """The kinds for the first `count` row lengths; those that no example can come to are left out."""
    steps: list[StepShape] = []
    lengths, table = finest.lengths[:count], np.full((2, count), -1)
    for apart, bucket in np.ndindex(2, count):
        # What would suit shorter rows than there are lies in the shortest.
        there = [loads[place] for place in sorted(loads) if (place[0], min(place[1], count - 1)) == (apart, bucket)]
        if not there:
            continue
        load = functools.reduce(operator.add, there)
        table[apart, bucket] = len(steps)
        branch = branch_size(config) if load.most_pairs else 0
        shape = RowShape(lengths[bucket], config.data.target_slots, config.data.pair_slots, load.longest, branch)
        shape = slot_sizes(load, shape, finest.packed, margin, costs.num_spans)
        steps.append(StepShape(config.data.rows_per_step << bucket, shape))
    return dataclasses.replace(finest, steps=tuple(steps), lengths=lengths, table=table)


def num_windows(weights_N: np.ndarray) -> int:
    """Windows of an epoch: parts that are planned each by itself."""
    return max(1, math.ceil(weights_N.sum() / WINDOW))


def epoch_order(config: Config, weights_N: np.ndarray, epoch: int) -> tuple[np.ndarray, np.random.Generator]:
    """int64 [n]: ids of an epoch's examples in the order they are planned in, and what shuffles the rows."""
    order = np.repeat(np.arange(len(weights_N)), copies(config, epoch, weights_N))
    rng = np.random.default_rng([config.seed, epoch])
    if config.data.shuffle:
        rng.shuffle(order)
    return order, rng


def plan_examples(
    config: Config, costs: Costs, kinds: Kinds, epoch: int, order_P: np.ndarray, rng: np.random.Generator
) -> tuple[Plan, ...]:
    """Rows of each kind that hold these examples of an epoch, in this order."""
    pairs_P = costs.pairs_N[order_P] * has_pair(config, epoch, order_P)
    kind_P = kinds.of(costs.tokens(pairs_P, examples=order_P), pairs_P)
    drawn_PxKx2 = costs.draw(config.seed, epoch, order_P)
    tokens_P, targets_P = costs.tokens(pairs_P, drawn_PxKx2, order_P), costs.targets_N[order_P]
    plans = []
    for kind, step in enumerate(kinds.steps):
        chosen = np.flatnonzero(kind_P == kind)
        if config.data.shuffle and kinds.packed:
            chosen = largest_first(chosen, tokens_P, step.row.length)
        plan = plan_rows(chosen, tokens_P, targets_P, pairs_P, step.row, kinds.packed).with_drawn(drawn_PxKx2)
        plan = dataclasses.replace(plan, examples=order_P[plan.examples])
        plans.append(shuffled(plan, rng) if config.data.shuffle else plan)
    return tuple(plans)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Every `stride`-th example of the first epoch, and what shuffles its rows."""

    order: np.ndarray
    stride: int
    rng: np.random.Generator


def _sample(config: Config, weights_N: np.ndarray) -> _Sample:
    stride = max(1, round(weights_N.sum() / SAMPLE))
    order, rng = epoch_order(config, weights_N, 0)
    return _Sample(order[::stride].copy(), stride, rng)


def _epoch_work(config: Config, costs: Costs, kinds: Kinds, sample: _Sample, whole_steps: bool) -> float:
    """FLOPs of the first epoch's rows, padding included; estimated from a sample.

    With `whole_steps`, the rest of each kind's last step is padding too: on little data, more kinds have more of it.
    """
    total = 0.0
    plans = plan_examples(config, costs, kinds, 0, sample.order, copy.deepcopy(sample.rng))
    for plan, step in zip(plans, kinds.steps, strict=True):
        steps = len(plan) * sample.stride / step.rows
        total += (np.ceil(steps) if whole_steps else steps) * step_work(config, step)
    return total


def step_work(config: Config, step: StepShape) -> float:
    """FLOPs of one step of a kind: every place of its rows, the head at every target slot."""
    row = step.row
    # All of what a local query looks back over is computed; over a whole row it is half on average.
    span = min(row.length, 2 * row.longest_segment)
    return step.rows * model_flops(config.model, row.width, row.target_slots, span)
