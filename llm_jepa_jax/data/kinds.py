# SPDX-License-Identifier: Apache-2.0
"""Kinds of steps: which shapes of rows a run has, which of them an example goes to, and an epoch's rows of each.

A step's rows are all of one kind, and each kind is compiled once. Kinds differ in row length (`data.row_buckets`) and,
with loss dropout by step, in whether their examples bring their pairs.
"""

import dataclasses

import numpy as np

from llm_jepa_jax.batch import RowShape, StepShape, row_lengths
from llm_jepa_jax.config import Config
from llm_jepa_jax.data.packing import Plan, largest_first, plan_rows, shuffled, slot_sizes
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
    choices = [_with_lengths(config, costs, weights_N, count, SLOT_MARGINS[0]) for count in counts]
    works = [epoch_work(config, costs, weights_N, kinds, whole_steps=True) for kinds in choices]
    best = next(i for i, work in enumerate(works) if min(works[i:]) > (1.0 - LEAST_SAVING) * work)
    if not choices[best].packed:
        return choices[best]
    others = [_with_lengths(config, costs, weights_N, counts[best], margin) for margin in SLOT_MARGINS[1:]]
    return min(choices[best], *others, key=lambda kinds: epoch_work(config, costs, weights_N, kinds, whole_steps=False))


def _with_lengths(config: Config, costs: Costs, weights_N: np.ndarray, count: int, margin: float) -> Kinds:
    """The kinds for `count` row lengths; those that no example can come to are left out."""
    data, jepa = config.data, config.objective.jepa
    packed, lengths = data.layout != "padded", tuple(row_lengths(data.row_length)[:count])
    share = (1.0 - jepa.dropout) if jepa.weight else 0.0
    used = np.flatnonzero(weights_N)
    drawn_NxKx2 = costs.draw(config.seed, 0)
    variants = [(keep, part) for keep, part in ((1, share), (0, 1.0 - share)) if part]
    every = Kinds((), lengths, jepa.dropout_by == "step", packed, np.arange(2 * count).reshape(2, count))
    kinds, tokens, pairs, weights, longest = ([] for _ in range(5))
    for keep, part in variants:
        pairs_N = costs.pairs_N * keep
        kinds.append(every.of(costs.tokens(pairs_N), pairs_N)[used])
        tokens.append(costs.tokens(pairs_N, drawn_NxKx2)[used])
        pairs.append(pairs_N[used])
        weights.append(weights_N[used] * part)
        longest.append((costs.longest_N if keep else costs.conversation_N)[used])
    columns = [np.concatenate(parts) for parts in (kinds, tokens, pairs, weights, longest)]
    targets_N = np.tile(costs.targets_N[used], len(variants))
    steps, table = [], np.full(2 * count, -1)
    for kind in range(2 * count):
        chosen = columns[0] == kind
        if not chosen.any():
            continue
        table[kind], bucket = len(steps), kind % count
        tokens_N, pairs_N, weight_N, longest_N = (column[chosen] for column in columns[1:])
        shape = RowShape(
            lengths[bucket], data.target_slots, data.pair_slots, int(longest_N.max()),
            branch_size(config) if pairs_N.any() else 0,
        )  # fmt: skip
        shape = slot_sizes(tokens_N, targets_N[chosen], pairs_N, weight_N, shape, packed, margin, costs.num_spans)
        steps.append(StepShape(data.rows_per_step << bucket, shape))
    return dataclasses.replace(every, steps=tuple(steps), table=table.reshape(2, count))


def plan_epoch(
    config: Config, costs: Costs, weights_N: np.ndarray, kinds: Kinds, epoch: int, stride: int = 1
) -> tuple[Plan, ...]:
    """One epoch's rows of each kind; with a `stride` every so many-th example's only."""
    order = np.repeat(np.arange(len(weights_N)), copies(config, epoch, weights_N))
    rng = np.random.default_rng([config.seed, epoch])
    if config.data.shuffle:
        rng.shuffle(order)
    order = order[::stride]
    pairs_N = costs.pairs_N * has_pair(config, epoch, np.arange(len(weights_N)))
    kind_N = kinds.of(costs.tokens(pairs_N), pairs_N)[order]
    drawn_NxKx2 = costs.draw(config.seed, epoch)
    tokens_N = costs.tokens(pairs_N, drawn_NxKx2)
    plans = []
    for kind, step in enumerate(kinds.steps):
        chosen = order[kind_N == kind]
        if config.data.shuffle and kinds.packed:
            chosen = largest_first(chosen, tokens_N, step.row.length)
        plan = plan_rows(chosen, tokens_N, costs.targets_N, pairs_N, step.row, kinds.packed).with_drawn(drawn_NxKx2)
        plans.append(shuffled(plan, rng) if config.data.shuffle else plan)
    return tuple(plans)


def epoch_work(config: Config, costs: Costs, weights_N: np.ndarray, kinds: Kinds, whole_steps: bool) -> float:
    """FLOPs of the first epoch's rows, padding included; estimated from a sample.

    With `whole_steps`, the rest of each kind's last step is padding too: on little data, more kinds have more of it.
    """
    stride = max(1, round(weights_N.sum() / SAMPLE))
    total = 0.0
    for plan, step in zip(plan_epoch(config, costs, weights_N, kinds, 0, stride), kinds.steps, strict=True):
        steps = len(plan) * stride / step.rows
        total += (np.ceil(steps) if whole_steps else steps) * step_work(config, step)
    return total


def step_work(config: Config, step: StepShape) -> float:
    """FLOPs of one step of a kind: every place of its rows, the head at every target slot."""
    row = step.row
    # All of what a local query looks back over is computed; over a whole row it is half on average.
    span = min(row.length, 2 * row.longest_segment)
    return step.rows * model_flops(config.model, row.width, row.target_slots, span)
