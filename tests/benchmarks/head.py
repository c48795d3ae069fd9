# SPDX-License-Identifier: Apache-2.0
"""Memory and time of the head, ours against the ways people write it: `python tests/benchmarks/head.py`.

Forward and backward of the cross-entropy of `--targets` targets over a vocabulary of `--vocabulary`, compiled for this
machine. One JSON line a case: temporary memory beyond inputs and gradients (read off the compiled program), and the
median time of a few turns, cases in turns. The naive head is measured in memory alone where `--time=no`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.huge_pages import use_huge_pages
from llm_jepa_jax.objectives.head import HeadSettings, cross_entropy

Loss = Callable[..., jax.Array]


def naive(
    hidden_RxLxD: jax.Array, head_DxV: jax.Array, index: jax.Array, targets: jax.Array, w: jax.Array
) -> jax.Array:
    """All logits at once."""
    logits = jnp.take_along_axis(hidden_RxLxD, index[..., None], axis=1) @ head_DxV
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * w)


def recomputed(chunk: int) -> Loss:
    """Chunks under `jax.checkpoint`: the usual remedy."""

    def loss(hidden_RxLxD: jax.Array, head_DxV: jax.Array, index: jax.Array, targets: jax.Array, w: jax.Array) -> Any:
        hidden = jnp.take_along_axis(hidden_RxLxD, index[..., None], axis=1).reshape(-1, chunk, head_DxV.shape[0])

        @jax.checkpoint
        def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            log_shares = jax.nn.log_softmax(part[0] @ head_DxV)
            return total - jnp.sum(jnp.take_along_axis(log_shares, part[1][:, None], axis=-1)[:, 0] * part[2]), None

        return jax.lax.scan(add, 0.0, (hidden, targets.reshape(-1, chunk), w.reshape(-1, chunk)))[0]

    return loss


def ours(chunk: int) -> Loss:
    """The head of this package."""
    return lambda *arrays: cross_entropy(*arrays, HeadSettings(chunk))


def main() -> None:
    """Compiles every case, then takes turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--targets", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunks", default="128,256,512", help="targets of a chunk, comma separated")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--time", choices=("yes", "no"), default="yes")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    arrays = (
        jnp.asarray(rng.normal(size=(8, args.targets // 8, args.width)), jnp.float32),
        jnp.asarray(rng.normal(size=(args.width, args.vocabulary)) * 0.05, jnp.float32),
        jnp.broadcast_to(jnp.arange(args.targets // 8), (8, args.targets // 8)),
        jnp.asarray(rng.integers(0, args.vocabulary, (8, args.targets // 8)), jnp.int32),
        jnp.ones((8, args.targets // 8), jnp.float32),
    )
    chunks = [int(chunk) for chunk in args.chunks.split(",")]
    losses = (
        {"naive": naive} | {f"recomputed {c}": recomputed(c) for c in chunks} | {f"ours {c}": ours(c) for c in chunks}
    )
    steps = {name: jax.jit(jax.value_and_grad(f, (0, 1))).lower(*arrays).compile() for name, f in losses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.turns + 1 if args.time == "yes" else 0):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            seconds[name].append(time.perf_counter() - start)
    first = steps["naive"].memory_analysis().temp_size_in_bytes
    for name, step in steps.items():
        temporary = step.memory_analysis().temp_size_in_bytes
        line = {"case": name, "temporary_mib": round(temporary / 2**20, 1), "of_naive": round(temporary / first, 4)}
        if args.time == "yes":
            median, naive_median = (float(np.median(seconds[n][1:])) for n in (name, "naive"))
            line |= {"seconds": round(median, 3), "time_of_naive": round(median / naive_median, 3)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    use_huge_pages()
    main()
