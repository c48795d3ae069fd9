# SPDX-License-Identifier: Apache-2.0
"""Speed of planning and of building rows, and fill, one JSON line a case.

`python tests/benchmarks/packing.py a.jsonl b.jsonl --row_lengths=512,1024` trains one tokenizer on all files and
measures each file at each row length, without and with loss dropout; times are the best of `--repeats`.
"""

import argparse
import json
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np

from llm_jepa_jax.config import Config, freeze
from llm_jepa_jax.data.packing import plan_rows
from llm_jepa_jax.data.pipeline import TrainData, make_train_data
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.text.tokenizer import Tokenizer, train_tokenizer


def main() -> None:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=pathlib.Path, help="JSONL files of records")
    parser.add_argument("--row_lengths", default="512,1024", help="tokens, comma separated")
    parser.add_argument("--pieces", type=int, default=1024, help="pieces of the tokenizer")
    parser.add_argument("--planned", type=int, default=100_000, help="examples to plan: the file's, repeated")
    parser.add_argument("--repeats", type=int, default=5, help="the fastest of this many runs is reported")
    args = parser.parse_args()
    sources = [JsonlSource(path) for path in args.files]
    tokenizer = train_tokenizer(
        (message.content for source in sources for record in source for message in record.messages), args.pieces
    )
    with tempfile.TemporaryDirectory() as cache_dir:
        for source in sources:
            for row_length in map(int, args.row_lengths.split(",")):
                for dropout in (0.0, 0.75):
                    config = case_config(row_length, dropout, cache_dir)
                    print(json.dumps(measure(source, tokenizer, config, args.planned, args.repeats)), flush=True)


def case_config(row_length: int, dropout: float, cache_dir: str) -> Config:
    """One case; every record that does not fit is dropped and counted."""
    return freeze(
        {
            "data": {"row_length": row_length, "max_dropped_share": 1.0, "cache_dir": cache_dir},
            "objective": {"jepa": {"dropout": dropout}},
            "train": {"num_steps": 0, "num_epochs": 1},
        }
    )


def measure(
    source: JsonlSource, tokenizer: Tokenizer, config: Config, planned: int, repeats: int
) -> dict[str, str | int | float]:
    """Fill and speeds of one file under one configuration."""
    data = make_train_data(config, tokenizer, source, np.ones(len(source)))
    summary = data.summary()
    examples = data.epochs.plan(0).examples
    order = np.tile(examples, -(-planned // len(examples)))[:planned]
    rows = data.rows()
    count = min(int(summary["rows_per_epoch"]), 1000)
    row_seconds = fastest(lambda: [rows[i] for i in range(count)], repeats)
    return {
        "file": source.path.name,
        "row_length": config.data.row_length,
        "dropout": config.objective.jepa.dropout,
        "examples": summary["examples"],
        "dropped": summary["dropped"],
        "fill": round(summary["fill"], 4),
        "examples_per_row": round(summary["examples_per_row"], 2),
        "target_slots": data.shape.target_slots,
        "pair_slots": data.shape.pair_slots,
        "planned_examples_per_s": round(planned / plan_seconds(data, order, repeats)),
        "rows_per_s": round(count / row_seconds),
        "tokens_per_s": round(count * config.data.row_length * summary["fill"] / row_seconds),
    }


def plan_seconds(data: TrainData, order_N: np.ndarray, repeats: int) -> float:
    """Seconds to plan the examples of `order`, as an epoch does."""
    costs = data.epochs.costs
    pairs_N = data.epochs.pairs(0, np.arange(len(data.epochs.fits_N)))
    tokens_N = costs.tokens(pairs_N)
    return fastest(lambda: plan_rows(order_N, tokens_N, costs.targets_N, pairs_N, data.shape), repeats)


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
