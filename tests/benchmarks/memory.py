# SPDX-License-Identifier: Apache-2.0
"""What memory costs in time: `python tests/benchmarks/memory.py`, one JSON line a case, ratios within a group.

Whole training steps of a `--width`-wide model on rows of random tokens. Temporary memory is read off the compiled
program (beyond state and batch); times are medians of turns, a step each. The groups: what the backward pass
recomputes, in how many parts the rows are taken, what the optimizer keeps, and adapters in place of all weights.
"""

import argparse
import json
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from llm_jepa_jax.batch import RowShape, empty_rows
from llm_jepa_jax.config import freeze
from llm_jepa_jax.huge_pages import use_huge_pages
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import global_batch
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step

SEGMENT = 64
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "remat": {name: {"train": {"remat": name}} for name in ("none", "dots", "full")},
    "micro_batches": {str(parts): {"train": {"micro_batches": parts}} for parts in (1, 2, 4, 8)},
    "micro_batches, remat full": {
        str(parts): {"train": {"micro_batches": parts, "remat": "full"}} for parts in (1, 2, 4, 8)
    },
    "optimizer": {
        "full": {},
        "bfloat16 first moment": {"opt": {"first_moment_dtype": "bfloat16"}},
        "factored second moment": {"opt": {"second_moment": "factored"}},
        "both": {"opt": {"first_moment_dtype": "bfloat16", "second_moment": "factored"}},
    },
    "adapters": {
        "all weights": {},
        "rank 16": {"lora": {"rank": 16}},
        "rank 16, int8": {"lora": {"rank": 16, "base_dtype": "int8"}},
        "rank 16, nf4": {"lora": {"rank": 16, "base_dtype": "nf4"}},
        "rank 16 on query and value": {"lora": {"rank": 16, "targets": "query,value"}},
    },
}


def rows_of(shape: RowShape, num_rows: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Rows of equal segments, every token but the last of a segment a target."""
    rng = np.random.default_rng(0)
    out = empty_rows(num_rows, shape)
    places = np.arange(shape.length)
    out["segments"][:], out["positions"][:] = places // SEGMENT + 1, places % SEGMENT
    out["target_index"][:], out["target_weight"][:] = places, places % SEGMENT != SEGMENT - 1
    out["tokens"] = rng.integers(0, vocabulary, out["tokens"].shape, np.int32)
    out["targets"] = rng.integers(0, vocabulary, out["targets"].shape, np.int32)
    return out


class Case:
    """One compiled step with its own state."""

    def __init__(self, values: dict[str, Any], args: argparse.Namespace):
        rows, length = args.rows, args.row_length
        model = {
            "vocab_size": 4096, "embed_dim": args.width, "num_layers": args.layers, "num_heads": args.width // 64,
            "num_kv_heads": args.width // 128, "head_dim": 64, "mlp_dim": args.width * 11 // 4,
        }  # fmt: skip
        objective = {"jepa": {"weight": 0.0}}
        config = freeze(
            {"data": {"row_length": length, "rows_per_step": rows}, "model": model, "objective": objective, **values}
        )
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        factory = state_factory(config, mesh, 100)
        shape = RowShape(length, length, 0, SEGMENT)
        self.batch = global_batch(mesh, rows_of(shape, rows, 4096))
        with jax.set_mesh(mesh):
            step = make_train_step(factory, 100, SEGMENT)
            self.step = step.lower(factory.abstract, self.batch).compile()
        self.state = factory.create()
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.opt_state))
        self.seconds: list[float] = []

    def take_turn(self) -> None:
        """One measured step."""
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Runs every group, its cases in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row_length", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    args = parser.parse_args()
    for group in args.groups:
        choices = GROUPS[group]
        cases = {name: Case(values, args) for name, values in choices.items()}
        for _ in range(args.turns + 1):
            for case in cases.values():
                case.take_turn()
        first = next(iter(cases.values()))
        for name, case in cases.items():
            temporary = case.step.memory_analysis().temp_size_in_bytes
            line = {
                "group": group,
                "case": name,
                "temporary_mib": round(temporary / 2**20, 1),
                "optimizer_mib": round(case.state_bytes / 2**20, 1),
                "memory_of_first": round(temporary / first.step.memory_analysis().temp_size_in_bytes, 3),
                "time_of_first": round(float(np.median(case.seconds[1:]) / np.median(first.seconds[1:])), 3),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    use_huge_pages()
    main()
