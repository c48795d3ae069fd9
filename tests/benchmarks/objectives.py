# SPDX-License-Identifier: Apache-2.0
"""What JEPA costs against next-token training, per example, on real records: one JSON line a case.

`python tests/benchmarks/objectives.py synth_train.jsonl` trains a tokenizer, packs the file under every case, and
measures whole training steps (both losses, update included). Cases take turns, two steps each, so that what else the
machine does falls on all of them; a ratio is the median of those of each turn. Run it on an idle machine.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from llm_jepa_jax.config import freeze
from llm_jepa_jax.data.pipeline import make_train_data
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.huge_pages import use_huge_pages
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import global_batch
from llm_jepa_jax.text.tokenizer import Tokenizer, train_tokenizer
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step

MODEL = {
    "vocab_size": 4096, "embed_dim": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
    "mlp_dim": 704,
}  # fmt: skip
OFF = {"jepa": {"weight": 0.0}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ntp": ("separate", OFF),
    "shared k=1": ("shared", {}),
    "shared k=1 LD 0.75": ("shared", {"jepa": {"dropout": 0.75}}),
    "shared k=1 LD 0.75 by step": ("shared", {"jepa": {"dropout": 0.75, "dropout_by": "step"}}),
    "shared k=4": ("shared", {"jepa": {"num_predictors": 4}}),
    "separate k=1": ("separate", {}),
    "separate k=1 LD 0.75": ("separate", {"jepa": {"dropout": 0.75}}),
    "padded ntp": ("padded", OFF),
    "stp": ("separate", OFF | {"stp": {"weight": 0.02}}),
    "stp curvature": ("separate", OFF | {"stp": {"weight": 0.02, "mode": "curvature"}}),
    "stp mean": ("separate", OFF | {"stp": {"weight": 0.02, "mode": "mean"}}),
    "separate k=1 vicreg": ("separate", {"vicreg": {"weight": 0.1}}),
    "separate k=1 sigreg": ("separate", {"sigreg": {"weight": 0.1}}),
    "separate k=1 infonce": ("separate", {"jepa": {"distance": "infonce"}}),
}
"""Layout and objective of each case; the first is what the others are measured against."""
WHOLE_STEP = ("separate k=1 vicreg", "separate k=1 sigreg", "separate k=1 infonce")
"""These need all pairs of a step at once: measured when named, with `--micro_batches=1` for all."""


@dataclasses.dataclass
class Case:
    """The compiled steps of one case, a function for each kind of steps, with its own state and stream."""

    name: str
    steps: list[Any]
    state: Any
    batches: Any
    mesh: Any
    summary: dict[str, Any]
    waiting: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list)
    example_seconds: list[float] = dataclasses.field(default_factory=list)
    token_seconds: list[float] = dataclasses.field(default_factory=list)

    def take_turn(self) -> None:
        """Two steps of each kind, as training has them one after the other; the second is measured, on memory of its
        own. Kinds count by their share of an epoch's examples."""
        shares = [kind["examples"] / self.summary["examples"] for kind in self.summary["kinds"]]
        seconds = tokens = 0.0
        for kind, share in enumerate(shares):
            for _ in range(2):
                spent, values = self._step(kind)
            examples = values["num_examples"].sum()
            seconds += share * spent / examples
            tokens += share * (values["segments"] > 0).sum() / examples
        self.example_seconds.append(seconds)
        self.token_seconds.append(seconds / tokens)

    def _step(self, kind: int) -> tuple[float, dict[str, Any]]:
        """Seconds of the stream's next step of a kind, and its rows."""
        self.waiting = self.waiting or [[] for _ in self.steps]
        while not self.waiting[kind]:
            values = next(self.batches)
            self.waiting[int(values["kind"])].append(values)
        values = self.waiting[kind].pop(0)
        batch = jax.block_until_ready(global_batch(self.mesh, values))
        start = time.perf_counter()
        self.state, metrics = self.steps[kind](self.state, batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start, values

    def per_example(self) -> np.ndarray:
        """Seconds an example of each turn after the first."""
        return np.array(self.example_seconds[1:])

    def per_token(self) -> np.ndarray:
        """Seconds a token, padding not counted, of each turn after the first."""
        return np.array(self.token_seconds[1:])


def make_case(name: str, source: JsonlSource, tokenizer: Tokenizer, args: argparse.Namespace, cache_dir: str) -> Case:
    """Compiles one case."""
    layout, objective = CASES[name]
    row_length = 128 if layout == "padded" else args.row_length
    objective = {**objective, "ntp": {"targets": "all"}}
    data = {"layout": layout, "row_length": row_length, "rows_per_step": args.tokens // row_length, "row_buckets": 1}
    config = freeze(
        {
            "model": MODEL,
            "objective": objective,
            "data": data | {"max_dropped_share": 1.0, "cache_dir": cache_dir},
            "train": {
                "num_steps": 100 * (args.steps + 1),
                "num_epochs": 0,
                "micro_batches": args.micro_batches,
                "dtype": args.dtype,
            },
        }
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    train_data = make_train_data(config, tokenizer, source, np.ones(len(source)))
    factory = state_factory(config, mesh, args.steps + 1)
    with jax.set_mesh(mesh):
        steps = [make_train_step(factory, args.steps + 1, kind.row.longest_segment) for kind in train_data.kinds]
    return Case(name, steps, factory.create(), train_data.iterator(0), mesh, train_data.summary())


def main() -> None:
    """Runs every case in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="JSONL file of records")
    parser.add_argument(
        "--cases",
        default=",".join(name for name in CASES if name not in WHOLE_STEP),
        help="names, comma separated; the first is the baseline",
    )
    parser.add_argument("--pieces", type=int, default=2048, help="pieces of the tokenizer; the model has 4096")
    parser.add_argument("--row_length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--micro_batches", type=int, default=4, help="parts of a step: small ones fit the CPU's cache")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each case")
    parser.add_argument("--dtype", default="float32", help="compute type")
    args = parser.parse_args()
    source = JsonlSource(args.file)
    tokenizer = train_tokenizer((m.content for record in source for m in record.messages), args.pieces)
    with tempfile.TemporaryDirectory() as cache_dir:
        cases = [make_case(name, source, tokenizer, args, cache_dir) for name in args.cases.split(",")]
        for _ in range(args.steps + 1):
            for case in cases:
                case.take_turn()
    for case in cases:
        line = {
            "case": case.name,
            "per_example": round(float(np.median(case.per_example() / cases[0].per_example())), 3),
            "per_token": round(float(np.median(case.per_token() / cases[0].per_token())), 3),
            "examples_per_s": round(1 / float(np.median(case.per_example())), 1),
            "tokens_per_s": round(1 / float(np.median(case.per_token()))),
            "fill": round(case.summary["fill"], 4),
            "examples_per_row": round(case.summary["examples_per_row"], 2),
            "pair_slots": case.summary["kinds"][0]["pair_slots"],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    use_huge_pages()
    main()
