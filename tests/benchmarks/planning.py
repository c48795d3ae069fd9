# SPDX-License-Identifier: Apache-2.0
"""Processor time and memory until the first step of a large corpus of shards can be built; one JSON line.

`python tests/benchmarks/planning.py --records=10000000` draws the lengths of so many pairs; their index,
as shards have it, is in memory before (`index_mib`). No token is read but those of the first step.
"""

import argparse
import json
import resource
import tempfile
import time

import numpy as np
from absl import flags

from llm_jepa_jax.config import freeze
from llm_jepa_jax.data.pipeline import make_train_data
from llm_jepa_jax.data.shard_files import INDEX, ReadRecord
from llm_jepa_jax.data.shards import ShardSource
from llm_jepa_jax.text.tokenizer import train_tokenizer

QUESTION, ANSWER = (8, 120), (4, 60)
"""Fewest and most tokens, without those around them."""


class DrawnShards(ShardSource):
    """Shards of records that are not there: their index, and tokens where they are asked for."""

    def __init__(self, records: int):
        rng = np.random.default_rng(0)
        question_N, answer_N = (rng.integers(*lengths, records, dtype=np.int32) for lengths in (QUESTION, ANSWER))
        zeros_N, ones_N = np.zeros(records, np.int32), np.ones(records, np.int32)
        end_N = 2 + question_N
        contents_Nx4 = np.stack([ones_N, end_N - 1, end_N + 1, end_N + 1 + answer_N], axis=-1).astype(np.int32)
        values = {
            "conversation": end_N + answer_N + 3, "targets": answer_N + 1, "contents": contents_Nx4, "pairs": ones_N,
            "sentences": zeros_N, "input": zeros_N, "line": np.arange(1, records + 1), "member": zeros_N - 1,
            "text_view": question_N + 2, "code_view": answer_N + 2,
            "text_places": np.stack([ones_N, end_N - 1], axis=-1), "view_headers": np.full((records, 2), 2),
            "bounds": np.zeros(0),
        }  # fmt: skip
        self.index = {name: np.asarray(values[name], kind) for name, (kind, _) in INDEX.items()}
        self.content_hash = str(records)

    def __len__(self) -> int:
        return len(self.index["line"])

    def check(self, tokenizer: object, pairs: str) -> None:
        """They are of any."""

    def location(self, index: int) -> str:
        return f"drawn:{index + 1}"

    def read(self, index: int) -> ReadRecord:
        size, question, answer = (int(self.index[name][index]) for name in ("conversation", "text_view", "code_view"))
        target = np.zeros(size, np.bool_)
        target[size - int(self.index["targets"][index]) :] = True
        views = np.zeros(question, np.int32), np.zeros(answer, np.int32)
        return ReadRecord(np.zeros(size, np.int32), target, views, b"")


def main() -> None:
    """Runs the case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000, help="records of the corpus")
    parser.add_argument("--steps", type=int, default=1000, help="train.num_steps")
    args = parser.parse_args()
    flags.FLAGS(["planning"])  # Grain wants them parsed
    with tempfile.TemporaryDirectory() as cache_dir:
        config = freeze({
            "data": {"row_length": 1024, "cache_dir": cache_dir}, "train": {"num_steps": args.steps, "num_epochs": 0},
        })  # fmt: skip
        tokenizer = train_tokenizer(("a question", "an answer"), 300)
        source = DrawnShards(args.records)
        before, started = _mib(), time.process_time()
        data = make_train_data(config, tokenizer, source, np.ones(args.records))
        data.steps()[0]
        seconds = time.process_time() - started
    print(json.dumps({
        "case": "first step", "records": args.records, "cpu_s": round(seconds, 1),
        "cpu_us_a_record": round(1e6 * seconds / args.records, 2), "index_mib": before, "peak_rss_mib": _mib(),
    }))  # fmt: skip


def _mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
