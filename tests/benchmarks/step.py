# SPDX-License-Identifier: Apache-2.0
"""Time of a training step, each choice against its alternative in one run: python tests/benchmarks/step.py

Prints one JSON line a case; ratios are against the first case of a group. Run it on an idle machine.
"""

import json
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from llm_jepa_jax.batch import RowShape, empty_rows
from llm_jepa_jax.config import freeze
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import global_batch
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step

REPEATS = 5


def rows_of(shape: RowShape, num_rows: int, segment: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Rows of equal segments, a quarter of the tokens targets, every slot used."""
    rng = np.random.default_rng(0)
    out = empty_rows(num_rows, shape)
    out["segments"][:] = np.arange(shape.length) // segment + 1
    out["positions"][:] = np.arange(shape.length) % segment
    out["target_weight"][:], out["pair_weight"][:] = 1.0, 1.0
    out["tokens"] = rng.integers(0, vocabulary, out["tokens"].shape, np.int32)
    out["target_index"] = rng.integers(0, shape.length, out["target_index"].shape, np.int32)
    out["predictor_index"] = rng.integers(0, shape.length, out["predictor_index"].shape, np.int32)
    out["code_index"] = rng.integers(0, shape.length, out["code_index"].shape, np.int32)
    return out


def seconds(values: dict, length: int, num_rows: int, longest: int) -> float:
    """Fastest of a few steps."""
    sizes = {"row_length": length, "rows_per_step": num_rows}
    config = freeze(values | {"data": sizes, "model": {"vocab_size": 1024} | values.get("model", {})})
    mesh = make_mesh(config.mesh)
    factory = state_factory(config, mesh, 100)
    batch = global_batch(mesh, rows_of(RowShape(length, length // 4, 8), num_rows, 50, 1024))
    state, times = factory.create(), []
    with jax.set_mesh(mesh):
        step = make_train_step(factory, 100, longest)
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - start)
    return min(times[1:])


SHAPES = {
    "6 x 192": {},
    "4 x 256": {"embed_dim": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "mlp_dim": 640},
    "4 x 224": {"embed_dim": 224, "num_layers": 4, "num_heads": 7, "num_kv_heads": 7, "mlp_dim": 640},
    "3 x 256": {"embed_dim": 256, "num_layers": 3, "num_heads": 8, "num_kv_heads": 2, "mlp_dim": 768},
}
GROUPS = {
    "attention over the longest segment": [("blocks of queries", {}, 512, 16, 0), ("longest segment", {}, 512, 16, 60)],
    "objective": [
        ("next token", {"objective": {"jepa": {"weight": 0.0}}}, 512, 16, 60),
        ("with jepa", {}, 512, 16, 60),
        ("with vicreg", {"objective": {"vicreg": {"weight": 0.1}}}, 512, 16, 60),
    ],
    "rows of a step": [(str(rows), {}, 512, rows, 60) for rows in (4, 8, 16)],
    "shape": [(name, {"model": model}, 512, 8, 60) for name, model in SHAPES.items()],
}  # fmt: skip


def main() -> None:
    for group, cases in GROUPS.items():
        first = None
        for name, values, length, num_rows, longest in cases:
            took = seconds(values, length, num_rows, longest)
            per_token = took / (length * num_rows)
            first = first or per_token
            line = {
                "group": group,
                "case": name,
                "tokens_per_s": round(1 / per_token),
                "ratio": round(per_token / first, 3),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
