# SPDX-License-Identifier: Apache-2.0
"""Planned epochs as one random-access stream of rows, read by Grain.

The stream is the epochs' plans one after the other. Row `g` of it depends on the configuration and the data only, so
the whole state of the input is one integer (the step), whatever the number of hosts, workers or restarts.
"""

import dataclasses
import logging
import pathlib
import threading
from typing import Any

import grain
import numpy as np
from grain.experimental import ElasticIterator

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.config import Config
from llm_jepa_jax.data.corpus import ELSEWHERE, TokenizedCorpus, tokenize_source
from llm_jepa_jax.data.packing import Plan, plan_rows, shuffled, slot_sizes
from llm_jepa_jax.data.rows import RowBuilder
from llm_jepa_jax.data.sources import Source
from llm_jepa_jax.data.views import copies, example_costs, has_pair
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.tokenizer import Tokenizer

LOG = logging.getLogger("llm_jepa_jax")
KEPT_PLANS = 3
DROPPED_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Records that do not fit a row."""

    count: int
    total: int
    first: tuple[str, ...]
    """`file:line (tokens)` of the first few."""


class Epochs:
    """Every epoch's plan, made when first needed; pickles without its plans."""

    def __init__(self, config: Config, corpus: TokenizedCorpus, weights_N: np.ndarray):
        self._config, self._packed = config, config.data.layout != "padded"
        self.costs = example_costs(corpus, config)
        every = np.ones(len(corpus), np.bool_)
        self.fits_N = self.costs.tokens(every) <= config.data.row_length
        self._weights_N = np.where(self.fits_N, weights_N, 0.0)
        self.shape = self._shape()
        self._starts = [0]
        self._plans: dict[int, Plan] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def _shape(self) -> RowShape:
        data, jepa = self._config.data, self._config.objective.jepa
        fits, costs = self.fits_N, self.costs
        longest = int(costs.longest_N[fits].max(initial=0))
        branch = jepa.num_predictors if data.layout == "shared" and jepa.weight else 0
        shape = RowShape(data.row_length, data.target_slots, data.pair_slots, longest, branch)
        if not fits.any():
            return shape
        share = np.full(int(fits.sum()), (1.0 - jepa.dropout) if jepa.weight else 0.0)
        expected = costs.conversation_N[fits] + costs.views_N[fits] * share
        return slot_sizes(expected, costs.targets_N[fits], share, self._weights_N[fits], shape, self._packed)

    def largest(self) -> int:
        """Tokens of the largest record, its views included."""
        return int(self.costs.tokens(np.ones(len(self.fits_N), np.bool_)).max())

    def tokens_per_record(self) -> tuple[float, float]:
        """Mean tokens of a conversation and of its views, over the records that fit."""
        return float(self.costs.conversation_N[self.fits_N].mean()), float(self.costs.views_N[self.fits_N].mean())

    def plan(self, epoch: int) -> Plan:
        """The rows of one epoch."""
        with self._lock:
            if epoch not in self._plans:
                while len(self._plans) >= KEPT_PLANS:
                    del self._plans[min(self._plans)]
                self._plans[epoch] = self._make(epoch)
            return self._plans[epoch]

    def _make(self, epoch: int) -> Plan:
        order = np.repeat(np.arange(len(self._weights_N)), copies(self._config, epoch, self._weights_N))
        rng = np.random.default_rng([self._config.seed, epoch])
        if self._config.data.shuffle:
            rng.shuffle(order)
        pairs = self.pairs(epoch, np.arange(len(self._weights_N)))
        plan = plan_rows(order, self.costs.tokens(pairs), self.costs.targets_N, pairs, self.shape, self._packed)
        return shuffled(plan, rng) if self._config.data.shuffle else plan

    def pairs(self, epoch: int, examples: np.ndarray) -> np.ndarray:
        """Which of these examples have their pair in this epoch."""
        return has_pair(self._config, epoch, examples)

    def start(self, epoch: int) -> int:
        """Place of an epoch's first row in the stream."""
        with self._lock:  # two readers at once would both add the same epoch
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + len(self.plan(len(self._starts) - 1)))
            return self._starts[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """Epoch of a row of the stream, and its place in that epoch's plan."""
        epoch = int(np.searchsorted(self._starts, row, side="right")) - 1
        while row >= self.start(epoch + 1):
            epoch += 1
        return epoch, row - self.start(epoch)


class PackedRows:
    """Rows of the stream by index: the source Grain reads. `num_rows` bounds it; rows past `end` are padding."""

    def __init__(self, epochs: Epochs, builder: RowBuilder, num_rows: int, end: int, interleave: tuple[int, int]):
        self._epochs, self._builder, self._num_rows, self._end = epochs, builder, num_rows, end
        self._rows_per_step, self._processes = interleave

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        # Grain gives process p of n the rows p, p + n, … of a step. Reordering them here lets process p hold the p-th
        # block, so that a step's global batch is the same array on any number of processes.
        step, place = divmod(int(index), self._rows_per_step)
        block = self._rows_per_step // self._processes
        row = step * self._rows_per_step + (place % self._processes) * block + place // self._processes
        if row >= self._end:
            return self._builder(np.zeros(0, np.int64), np.zeros(0, np.bool_))
        epoch, number = self._epochs.locate(row)
        examples = self._epochs.plan(epoch)[number]
        return self._builder(examples, self._epochs.pairs(epoch, examples))


@dataclasses.dataclass(frozen=True)
class TrainData:
    """The training stream of one configuration."""

    config: Config
    epochs: Epochs
    builder: RowBuilder
    num_steps: int
    end: int
    """Rows of the stream that hold examples."""
    dropped: Dropped

    @property
    def shape(self) -> RowShape:
        return self.epochs.shape

    def rows(self, processes: int = 1) -> PackedRows:
        """The stream as a random-access source, ordered for this many processes."""
        rows_per_step = self.config.data.rows_per_step
        num_rows = self.num_steps * rows_per_step
        return PackedRows(self.epochs, self.builder, num_rows, self.end, (rows_per_step, processes))

    def iterator(self, step: int, process: int = 0, processes: int = 1) -> Any:
        """This process's part of every step's rows from `step` on: dictionaries of [rows / processes, …] arrays."""
        data = self.config.data
        workers = grain.multiprocessing.MultiprocessingOptions(num_workers=data.workers) if data.workers else None
        iterator = iter(
            ElasticIterator(
                grain.MapDataset.source(self.rows(processes)),
                data.rows_per_step,
                grain.sharding.ShardOptions(shard_index=process, shard_count=processes),
                read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * data.rows_per_step),
                multiprocessing_options=workers,
            )
        )
        iterator.set_state({"global_next_index": step * data.rows_per_step})
        return iterator

    def summary(self) -> dict[str, float]:
        """Sizes and fill of the first epoch."""
        plan = self.epochs.plan(0)
        conversation, views = self.epochs.tokens_per_record()
        in_branches = int(self.epochs.pairs(0, plan.examples).sum()) * self.shape.branch
        return {
            "examples": len(plan.examples),
            "dropped": self.dropped.count,
            "rows_per_epoch": len(plan),
            "examples_per_row": len(plan.examples) / len(plan),
            "fill": (plan.tokens + in_branches) / (len(plan) * self.shape.width),
            "conversation_tokens": conversation,
            "view_tokens": views + self.shape.branch,
            "target_slots": self.shape.target_slots,
            "pair_slots": self.shape.pair_slots,
            "num_steps": self.num_steps,
        }


def make_train_data(config: Config, tokenizer: Tokenizer, source: Source, weights_N: np.ndarray) -> TrainData:
    """Tokenises, plans and reports.

    Raises:
        UserError: a record is wrong, too many do not fit, none is left, or a size of the configuration is too small.
    """
    cache_dir = pathlib.Path(config.data.cache_dir).expanduser()
    jepa = config.objective.jepa
    corpus = tokenize_source(source, tokenizer, jepa.view_end, cache_dir)
    epochs = Epochs(config, corpus, weights_N)
    dropped = _drop(config, source, epochs)
    _check_sizes(config, source, epochs)
    predictors = tokenizer.predictor_ids[: jepa.num_predictors]
    if config.data.layout == "shared" and jepa.weight:
        _check_views_inside(source, corpus)
    builder = RowBuilder(corpus, epochs.shape, config.objective.ntp.targets, predictors, config.data.layout == "shared")
    rows_per_step = config.data.rows_per_step
    if config.train.num_steps:
        num_steps = config.train.num_steps
        end = num_steps * rows_per_step
    else:
        end = epochs.start(config.train.num_epochs)
        num_steps = -(-end // rows_per_step)
    return TrainData(config, epochs, builder, num_steps, end, dropped)


def _check_views_inside(source: Source, corpus: TokenizedCorpus) -> None:
    """The shared layout reads the text view inside the conversation: it must be there."""
    elsewhere = np.flatnonzero(corpus.text_end == ELSEWHERE)
    if len(elsewhere):
        raise UserError(
            f"{source.location(int(elsewhere[0]))}: `text` is not the last user turn (so in {len(elsewhere)} of "
            f"{len(corpus)} records), but `data.layout`=shared reads it there; use data.layout=separate"
        )


def _check_sizes(config: Config, source: Source, epochs: Epochs) -> None:
    """Refuses sizes that no record, or not the largest one, could be trained with."""
    shape, fits_N = epochs.shape, epochs.fits_N
    if not fits_N.any():
        raise UserError(
            f"config: `data.row_length`={shape.length} fits none of the {len(fits_N)} records; the longest takes "
            f"{epochs.largest()} tokens"
        )
    for key, size, sizes_N, what in (
        ("data.target_slots", shape.target_slots, epochs.costs.targets_N, "next-token targets"),
        ("model.max_positions", config.model.max_positions, epochs.costs.longest_N, "tokens in one segment"),
    ):
        largest = int(np.argmax(np.where(fits_N, sizes_N, 0)))
        if sizes_N[largest] > size:
            raise UserError(
                f"config: `{key}`={size} is below the {sizes_N[largest]} {what} of {source.location(largest)}; "
                "raise it to that, or lower `data.row_length` to drop such records"
            )
    if not len(epochs.plan(0)):
        raise UserError(
            f"config: the weights of `data.train`={config.data.train} leave no example in the first epoch; "
            "a weight is copies of each record an epoch: raise it"
        )


def _drop(config: Config, source: Source, epochs: Epochs) -> Dropped:
    """Counts and reports the records that do not fit; refuses to go on past the configured share."""
    too_long = np.flatnonzero(~epochs.fits_N)
    first = tuple(source.location(int(i)) for i in too_long[:DROPPED_SHOWN])
    dropped = Dropped(len(too_long), len(epochs.fits_N), first)
    if not dropped.count:
        return dropped
    length = config.data.row_length
    words = f"{dropped.count} of {dropped.total} records do not fit data.row_length={length}: {', '.join(first)}"
    words += ", …" if dropped.count > len(first) else ""
    share = dropped.count / dropped.total
    if share > config.data.max_dropped_share:
        raise UserError(
            f"{words}; that is {share:.1%}, above data.max_dropped_share={config.data.max_dropped_share:.1%}; "
            f"set data.row_length={-(-epochs.largest() // 64) * 64} to fit all"
        )
    LOG.warning("%s; they are left out", words)
    return dropped
