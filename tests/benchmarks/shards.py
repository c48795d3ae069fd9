# SPDX-License-Identifier: Apache-2.0
"""Shards of tokens: speed and memory of writing them, and of reading rows from them and from the cache; JSON lines.

`python tests/benchmarks/shards.py --records=1000000` makes a corpus of random words, one question and answer a record,
and writes it as shards by `--processes`; tokens count views, `peak_rss_mib` is the most that one process has held until
then. Reading builds the first `--steps` steps of 8 rows of 1,024 tokens.
"""

import argparse
import json
import pathlib
import random
import resource
import string
import tempfile
import time

from absl import flags

from llm_jepa_jax.config import freeze
from llm_jepa_jax.data.pipeline import make_train_data
from llm_jepa_jax.data.sources import open_splits
from llm_jepa_jax.prepare.shards import prepare_shards
from llm_jepa_jax.text.tokenizer import load_tokenizer, train_tokenizer

WORDS = 5000
LENGTHS = (6, 24), (3, 12)
"""Fewest and most words of a question and of an answer."""


def main() -> None:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000, help="records of the corpus")
    parser.add_argument("--shards", type=int, default=16, help="shards to write")
    parser.add_argument("--processes", type=int, default=2, help="processes that write")
    parser.add_argument("--steps", type=int, default=50, help="steps of rows to read")
    args = parser.parse_args()
    flags.FLAGS(["shards"])  # Grain wants them parsed
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        write_corpus(directory / "corpus.jsonl", args.records)
        lines = (directory / "corpus.jsonl").open().readlines(1 << 22)
        texts = (turn["content"] for line in lines for turn in json.loads(line)["messages"])
        train_tokenizer(texts, 4096).save_model(directory / "small.model")
        values = {
            "text": {"tokenizer": str(directory / "small.model")},
            "data": {"cache_dir": str(directory / "cache")},
        }
        result = prepare_shards(
            freeze(values), str(directory / "corpus.jsonl"), args.shards, args.processes, directory / "shards"
        )
        kept = ("records", "tokens", "view_tokens", "bytes", "seconds", "tokens_per_s", "peak_rss_mib")
        print(json.dumps({"case": "write", "processes": args.processes} | {k: result[k] for k in kept}), flush=True)
        for case, train in (("read shards", "shards"), ("read JSONL's cache", "corpus.jsonl")):
            print(json.dumps({"case": case} | read(directory, train, values, args.steps)), flush=True)


def write_corpus(path: pathlib.Path, count: int) -> None:
    """Records of words drawn with seed 0."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(WORDS)]
    with path.open("w") as file:
        for _ in range(count):
            user, assistant = (" ".join(rng.choices(words, k=rng.randint(*lengths))) for lengths in LENGTHS)
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            file.write(json.dumps({"messages": turns}) + "\n")


def read(directory: pathlib.Path, train: str, values: dict[str, dict[str, str]], steps: int) -> dict[str, float]:
    """Processor time until the first step can be read, and tokens a second of it in building steps."""
    config = freeze(
        values
        | {
            "data": values["data"]
            | {"train": str(directory / train), "eval": "synthetic", "row_buckets": 1, "row_length": 1024}
        }
    )
    started = time.process_time()
    splits = open_splits(config.data, 0)
    data = make_train_data(config, load_tokenizer(values["text"]["tokenizer"]), splits.train, splits.weights)
    source = data.steps()
    source[0]
    ready = time.process_time()
    tokens = sum(int((source[step]["segments"] > 0).sum()) for step in range(1, 1 + min(steps, len(source) - 1)))
    return {
        "ready_cpu_s": round(ready - started, 2),
        "tokens_per_cpu_s": round(tokens / (time.process_time() - ready)),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
