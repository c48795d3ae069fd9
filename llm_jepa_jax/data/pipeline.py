# SPDX-License-Identifier: Apache-2.0
"""Planned epochs as one random-access stream of steps, read by Grain.

Step `s` of the stream depends on the configuration and the data only, so the whole state of the input is one integer,
whatever the number of hosts, workers or restarts.
"""

import dataclasses
import logging
import pathlib
from typing import Any

import grain
import numpy as np

from llm_jepa_jax.batch import StepShape
from llm_jepa_jax.config import Config
from llm_jepa_jax.data.epochs import Epochs
from llm_jepa_jax.data.indexed import Corpus, tokenized
from llm_jepa_jax.data.kinds import make_kinds
from llm_jepa_jax.data.packing import Plan
from llm_jepa_jax.data.rows import RowBuilder
from llm_jepa_jax.data.sources import Source
from llm_jepa_jax.data.spans import has_answer, text_lengths
from llm_jepa_jax.data.views import Costs, branch_size, copies, example_costs, records_of_pairs, shortest_views
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.chat import view_tokens
from llm_jepa_jax.text.tokenizer import Tokenizer

LOG = logging.getLogger("llm_jepa_jax")
DROPPED_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Records that do not fit a row."""

    count: int
    total: int
    first: tuple[str, ...]
    """`file:line` of the first few."""


class Steps:
    """One process's rows of every step, by the step's number: the source that Grain reads.

    A step's rows are cut into equal parts, and a process holds those of its devices (`sharding.row_parts`), so that a
    step's global batch is the same arrays on any number of processes. Every process has every step.
    """

    def __init__(self, epochs: Epochs, builder: RowBuilder, num_steps: int, parts: tuple[int, ...], num_parts: int):
        self._epochs, self._builder, self._num_steps = epochs, builder, num_steps
        self._parts, self._num_parts = parts, num_parts

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """Arrays of its rows as in `Batch`, and the step's `kind`: its place in `TrainData.kinds`."""
        kind, plan = self._epochs.step(int(step))
        shape = self._epochs.kinds.steps[kind]
        size = shape.rows // self._num_parts
        blocks = [
            self._builder(plan.rows(first * size, stop * size), (stop - first) * size, shape.row)
            for first, stop in _runs(self._parts)
        ]
        rows = (
            {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]} if blocks[1:] else blocks[0]
        )
        return rows | {"kind": np.asarray(kind, np.int32)}


def _runs(parts: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and stop of each run of numbers that follow each other."""
    breaks = [i for i in range(1, len(parts)) if parts[i] != parts[i - 1] + 1]
    return [(parts[a], parts[b - 1] + 1) for a, b in zip([0, *breaks], [*breaks, len(parts)], strict=True)]


@dataclasses.dataclass(frozen=True)
class TrainData:
    """The training stream of one configuration."""

    config: Config
    epochs: Epochs
    builder: RowBuilder
    num_steps: int
    dropped: Dropped
    fits_N: np.ndarray

    @property
    def kinds(self) -> tuple[StepShape, ...]:
        """The sizes of every kind of steps: one compiled function each."""
        return self.epochs.kinds.steps

    def steps(self, parts: tuple[int, ...] = (0,), num_parts: int = 1) -> Steps:
        """The stream as a random-access source of these parts of each step."""
        return Steps(self.epochs, self.builder, self.num_steps, parts, num_parts)

    def iterator(self, step: int, parts: tuple[int, ...] = (0,), num_parts: int = 1) -> Any:
        """These parts of every step from `step` on, as `Steps` gives them, built ahead."""
        data = self.config.data
        steps = grain.MapDataset.source(self.steps(parts, num_parts))[step:]
        dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch))
        if data.workers:
            dataset = dataset.mp_prefetch(
                grain.multiprocessing.MultiprocessingOptions(
                    num_workers=data.workers, per_worker_buffer_size=data.prefetch
                )
            )
        return iter(dataset)

    def summary(self) -> dict[str, Any]:
        """Sizes and fill of the first epoch, all kinds together and each by itself.

        Of several windows the first is counted, as often as there are windows.
        """
        costs, windows = self.epochs.costs, self.epochs.windows
        plans = self.epochs.get(0).plans  # nothing is left from before it
        ids = np.flatnonzero(self.fits_N)[::windows]
        drawn_NxKx2, pairs_N = costs.draw(self.config.seed, 0, ids), costs.pairs_N[ids]
        views_N = costs.tokens(pairs_N, drawn_NxKx2, ids) - costs.tokens(np.zeros_like(pairs_N), drawn_NxKx2, ids)
        views_N += branch_size(self.config) * pairs_N
        examples, rows = sum(len(plan.examples) for plan in plans), sum(map(len, plans))
        tokens = sum(map(self.epochs.tokens, plans))
        places = sum(len(plan) * kind.row.width for plan, kind in zip(plans, self.kinds, strict=True))
        return {
            "examples": examples * windows,
            "pairs": sum(int(plan.pairs.sum()) for plan in plans) * windows,
            "dropped": self.dropped.count,
            "windows_per_epoch": windows,
            "rows_per_epoch": rows * windows,
            "examples_per_row": examples / rows,
            "fill": tokens / places,
            "conversation_tokens": float(costs.conversation_N[ids].mean()),
            "view_tokens": float(views_N.mean()),
            "num_steps": self.num_steps,
            "kinds": [self._kind_summary(plan, kind) for plan, kind in zip(plans, self.kinds, strict=True)],
        }

    def _kind_summary(self, plan: Plan, kind: StepShape) -> dict[str, float]:
        return {
            "rows_per_step": kind.rows,
            "row_length": kind.row.length,
            "longest_segment": kind.row.longest_segment,
            "target_slots": kind.row.target_slots,
            "pair_slots": kind.row.pair_slots,
            "examples": len(plan.examples) * self.epochs.windows,
            "rows_per_epoch": len(plan) * self.epochs.windows,
            "fill": self.epochs.tokens(plan) / max(1, len(plan) * kind.row.width),
        }


def make_train_data(config: Config, tokenizer: Tokenizer, source: Source, weights_N: np.ndarray) -> TrainData:
    """Tokenises, plans and reports.

    Raises:
        UserError: a record is wrong, too many do not fit, none is left, or a size of the configuration is too small.
    """
    cache_dir = pathlib.Path(config.data.cache_dir).expanduser()
    jepa, train = config.objective.jepa, config.train
    corpus = tokenized(source, tokenizer, cache_dir, config.data.pairs)
    costs = example_costs(corpus, config)
    most_N = costs.tokens(costs.pairs_N)
    fits_N = most_N <= config.data.row_length
    dropped = _drop(config, source, fits_N, int(most_N.max()))
    _check_sizes(config, source, costs, fits_N, int(most_N.max()))
    _check_views(config, source, corpus, costs)
    _report_idle(config, costs, fits_N)
    weights_N = np.where(fits_N, weights_N, 0.0)
    if not copies(config, 0, weights_N).any():
        raise UserError(
            f"config: the weights of `data.train`={config.data.train} leave no example in the first epoch; "
            "a weight is copies of each record an epoch: raise it"
        )
    epochs = Epochs(config, costs, weights_N, make_kinds(config, costs, weights_N))
    builder = RowBuilder(corpus, config, view_tokens(tokenizer, jepa), tokenizer.mask_id, costs)
    num_steps = train.num_steps
    if not num_steps:
        num_steps = epochs.end(epochs.last) + len(epochs.remains())
    return TrainData(config, epochs, builder, num_steps, dropped, fits_N)


def _check_views(config: Config, source: Source, corpus: Corpus, costs: Costs) -> None:
    """Views must have a token where they are read; the shared layout reads the text view inside the conversation."""
    jepa = config.objective.jepa
    if not jepa.weight:
        return
    for view, length_N in shortest_views(corpus, config).items():
        shortest = int(np.argmin(length_N))
        if length_N[shortest] <= jepa.view_end_offset:
            raise UserError(
                f"config: `objective.jepa.view_end_offset`={jepa.view_end_offset} lies before the {length_N[shortest]} "
                f"tokens of the {view} view of {source.location(shortest)}; use at most {length_N[shortest] - 1}"
            )
    if config.data.layout != "shared":
        return
    elsewhere = records_of_pairs(corpus)[corpus.text_places[:, 1] < 0]
    if len(elsewhere):
        raise UserError(
            f"{source.location(int(elsewhere[0]))}: `text` is no user turn (so in {len(set(elsewhere.tolist()))} of "
            f"{len(corpus)} records), but `data.layout`=shared reads it there; use data.layout=separate"
        )
    if costs.texts is not None and jepa.view_end == "turn" and not branch_size(config):
        text = int(np.flatnonzero(np.diff(costs.texts.offsets))[0])
        raise UserError(
            f"{source.location(text)}: plain text has no end-of-turn token at a cut, where `data.layout`=shared would "
            "read its first view under `objective.jepa.view_end`=turn; use view_end=content, or data.layout=separate"
        )


def _report_idle(config: Config, costs: Costs, fits_N: np.ndarray) -> None:
    """Counts the examples that a term has nothing to draw from."""
    stp, count, points_Nx4 = config.objective.stp, int(fits_N.sum()), costs.points_Nx4[fits_N]
    if costs.texts is not None:
        texts_N = costs.texts.lengths()[fits_N] > 0
        single = int((texts_N & (costs.pairs_N[fits_N] == 0)).sum())
        unit = "sentences" if costs.text_views == "sentence" else "tokens"
        if single:
            LOG.warning("%d of %d plain texts have fewer than 2 %s: no JEPA pair", single, texts_N.sum(), unit)
    if not stp.weight or stp.mode == "curvature":
        return
    if stp.mode in ("mean", "e2e"):
        idle, why = int((~has_answer(points_Nx4)).sum()), f"no assistant turn for objective.stp.mode={stp.mode}"
    else:
        idle, why = int((text_lengths(points_Nx4) < 2).sum()), "fewer than 2 tokens to draw a span from"
    if idle:
        LOG.warning("%d of %d examples have %s: no STP term", idle, count, why)


def _check_sizes(config: Config, source: Source, costs: Costs, fits_N: np.ndarray, longest: int) -> None:
    """Refuses sizes that no record, or not the largest one, could be trained with."""
    if not fits_N.any():
        raise UserError(
            f"config: `data.row_length`={config.data.row_length} fits none of the {len(fits_N)} records; the longest "
            f"takes {longest} tokens"
        )
    for key, size, sizes_N, what in (
        ("data.target_slots", config.data.target_slots, costs.targets_N, "next-token targets"),
        ("data.pair_slots", config.data.pair_slots, costs.pairs_N, "pairs"),
        ("model.max_positions", config.model.max_positions, costs.longest_N, "tokens in one segment"),
    ):
        largest = int(np.argmax(np.where(fits_N, sizes_N, 0)))
        if size and sizes_N[largest] > size:
            raise UserError(
                f"config: `{key}`={size} is below the {sizes_N[largest]} {what} of {source.location(largest)}; "
                "raise it to that, or lower `data.row_length` to drop such records"
            )


def _drop(config: Config, source: Source, fits_N: np.ndarray, longest: int) -> Dropped:
    """Counts and reports the records that do not fit; refuses to go on past the configured share."""
    too_long = np.flatnonzero(~fits_N)
    first = tuple(source.location(int(i)) for i in too_long[:DROPPED_SHOWN])
    dropped = Dropped(len(too_long), len(fits_N), first)
    if not dropped.count:
        return dropped
    length = config.data.row_length
    words = f"{dropped.count} of {dropped.total} records do not fit data.row_length={length}: {', '.join(first)}"
    words += ", …" if dropped.count > len(first) else ""
    share = dropped.count / dropped.total
    if share > config.data.max_dropped_share:
        raise UserError(
            f"{words}; that is {share:.1%}, above data.max_dropped_share={config.data.max_dropped_share:.1%}; "
            f"set data.row_length={-(-longest // 64) * 64} to fit all"
        )
    LOG.warning("%s; they are left out", words)
    return dropped
