# SPDX-License-Identifier: Apache-2.0
"""Speed of planning, of building rows and of the whole input, and fill: one JSON line a case.

`python tests/benchmarks/packing.py a.jsonl b.jsonl` trains one tokenizer on all files and measures each file in every
layout, without and with loss dropout, on one core; then the input as training reads it (`loader`), without and with a
worker process; then what rows of several lengths and rows of one example cost (`rows`). Speeds are medians of
`--repeats` runs.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from llm_jepa_jax.config import Config, freeze
from llm_jepa_jax.data.kinds import largest_first, step_work
from llm_jepa_jax.data.packing import plan_rows
from llm_jepa_jax.data.pipeline import TrainData, make_train_data
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.huge_pages import use_huge_pages
from llm_jepa_jax.text.tokenizer import Tokenizer, train_tokenizer

MODEL = {"vocab_size": 4096, "embed_dim": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 704}
ROWS: dict[str, dict[str, Any]] = {
    "packed, one length": {"row_buckets": 1},
    "packed, two lengths": {"row_buckets": 2},
    "packed, three lengths": {"row_buckets": 3},
    "packed, as many as pay": {"row_buckets": 0},
    "padded, one length": {"layout": "padded", "row_buckets": 1},
    "padded, four lengths": {"layout": "padded", "row_buckets": 4},
}


def main() -> None:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=pathlib.Path, help="JSONL files of records")
    parser.add_argument("--row_length", type=int, default=1024, help="tokens")
    parser.add_argument("--pieces", type=int, default=2048, help="pieces of the tokenizer; the model has 4096")
    parser.add_argument("--planned", type=int, default=100_000, help="examples to plan: the file's, repeated")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is reported")
    args = parser.parse_args()
    flags.FLAGS(["packing"])  # Grain's worker processes want them parsed
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sources = [JsonlSource(path) for path in args.files]
    tokenizer = train_tokenizer(
        (message.content for source in sources for record in source for message in record.messages), args.pieces
    )
    with tempfile.TemporaryDirectory() as cache_dir:
        for source in sources:
            case = Case(source, tokenizer, args, cache_dir)
            for layout, dropout in itertools.product(("separate", "shared"), (0.0, 0.75)):
                case.packing(layout, dropout)
            for workers in (0, 1):
                case.loader(workers)
            case.rows()


class Case:
    """One file, and what is measured of it."""

    def __init__(self, source: JsonlSource, tokenizer: Tokenizer, args: argparse.Namespace, cache_dir: str):
        self._source, self._tokenizer, self._args, self._cache_dir = source, tokenizer, args, cache_dir

    def _data(self, data: dict[str, Any], jepa: dict[str, Any], num_steps: int = 0) -> TrainData:
        """Every record that does not fit is dropped and counted."""
        sizes = {"row_length": self._args.row_length, "max_dropped_share": 1.0, "cache_dir": self._cache_dir}
        train = {"num_steps": num_steps, "num_epochs": 0 if num_steps else 1}
        values = {"data": sizes | data, "model": MODEL, "objective": {"jepa": jepa}, "train": train}
        config: Config = freeze(values)
        return make_train_data(config, self._tokenizer, self._source, np.ones(len(self._source)))

    def _print(self, case: str, **values: Any) -> None:
        print(json.dumps({"case": case, "file": self._source.path.name} | values), flush=True)

    def packing(self, layout: str, dropout: float) -> None:
        """Fill, planning and building rows, of one row length."""
        data = self._data({"layout": layout, "row_buckets": 1}, {"dropout": dropout})
        summary, (plan,), (kind,) = data.summary(), data.epochs.get(0).plans, data.kinds
        shown = plan.rows(0, 1000)
        row_seconds = self._median(lambda: data.builder(shown, len(shown), kind.row))
        self._print(
            "packing", layout=layout, dropout=dropout, examples=summary["examples"], dropped=summary["dropped"],
            fill=round(summary["fill"], 4), least_rows=least_rows(data), rows=len(plan),
            examples_per_row=round(summary["examples_per_row"], 2), target_slots=kind.row.target_slots,
            pair_slots=kind.row.pair_slots, planned_examples_per_s=round(self._args.planned / self._planning(data)),
            tokens_per_s=round(data.epochs.tokens(shown) / row_seconds),
        )  # fmt: skip

    def _planning(self, data: TrainData) -> float:
        """Seconds to plan as many examples as asked for, in an epoch's way."""
        (plan,), (kind,), costs = data.epochs.get(0).plans, data.kinds, data.epochs.costs
        order_N = np.tile(plan.examples, -(-self._args.planned // len(plan.examples)))[: self._args.planned]
        pairs_N = np.zeros(len(costs.conversation_N), np.int64)
        pairs_N[plan.examples] = plan.pairs
        tokens_N = costs.tokens(pairs_N)
        return self._median(
            lambda: plan_rows(
                largest_first(order_N, tokens_N, kind.row.length), tokens_N, costs.targets_N, pairs_N, kind.row
            )
        )

    def loader(self, workers: int) -> None:
        """The iterator that training reads, from its second step on; plans of epochs are made in between."""
        steps = 60
        rates = []
        for _ in range(self._args.repeats):
            data = self._data({"rows_per_step": 32, "workers": workers}, {}, num_steps=steps)
            batches = data.iterator(0)
            next(batches)
            start, tokens = time.perf_counter(), 0
            for _ in range(steps - 1):  # not to its end, where a worker process takes a second to go
                tokens += int((next(batches)["segments"] > 0).sum())
            rates.append(tokens / (time.perf_counter() - start))
            batches.close()
        self._print("loader", workers=workers, tokens_per_s=round(statistics.median(rates)))

    def rows(self) -> None:
        """Estimated work of an example, and padding, by kinds of rows."""
        first = None
        for name, values in ROWS.items():
            data = self._data(values, {})
            plans, summary = data.epochs.get(0).plans, data.summary()
            work = sum(
                len(plan) / kind.rows * step_work(data.config, kind)
                for plan, kind in zip(plans, data.kinds, strict=True)
            )
            first = first or work
            self._print(
                "rows", kinds=name, work_per_example=round(work / first, 3), padding=round(1 - summary["fill"], 4),
                row_lengths=[kind.row.length for kind in data.kinds],
                longest_segments=[kind.row.longest_segment for kind in data.kinds],
            )  # fmt: skip

    def _median(self, work: Callable[[], object]) -> float:
        """Median seconds of a run."""
        seconds = []
        for _ in range(self._args.repeats):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


def least_rows(data: TrainData) -> int:
    """A lower bound on the rows of the first epoch (Martello & Toth, 1990: no packing can use fewer)."""
    (plan,), length = data.epochs.get(0).plans, data.kinds[0].row.length
    costs = data.epochs.costs
    size_N = costs.tokens(plan.pairs, plan.drawn, plan.examples)
    bounds = []
    for small in range(length // 2 + 1):
        large = size_N > length - small
        middle = ~large & (size_N > length // 2)
        rest = ~large & ~middle & (size_N >= small)
        room = int(middle.sum()) * length - int(size_N[middle].sum())
        bounds.append(int(large.sum() + middle.sum()) + max(0, -(-(int(size_N[rest].sum()) - room) // length)))
    return max(bounds)


if __name__ == "__main__":
    use_huge_pages()
    main()
