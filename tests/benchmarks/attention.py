# SPDX-License-Identifier: Apache-2.0
"""Attention forward and backward by the ways of the `xla` back end: python tests/benchmarks/attention.py

Prints one JSON line a case. In each group (row length, longest segment) the cases take turns, a step each, so that
what else the machine does falls on all of them; times are medians, ratios are against the dense L² reference.
`temporary_mib` is what XLA reserves beside arguments and results. Run it on an idle machine.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.models.attention import xla

GROUPS = ((512, 64), (512, 200), (2048, 64), (2048, 256), (2048, 1024), (4096, 512), (4096, 2048))
"""Row length and longest segment."""
TOKENS, HEADS, KV_HEADS, WIDTH = 4096, 4, 2, 64


def dense(
    query_RxLxHxh: jax.Array, key_RxLxKxh: jax.Array, value_RxLxKxh: jax.Array, segments_RxL: jax.Array
) -> jax.Array:
    """All scores at once."""
    length = segments_RxL.shape[1]
    allowed = jnp.tril(jnp.ones((length, length), bool)) & (segments_RxL[:, :, None] == segments_RxL[:, None, :])
    return xla.attend_masked(query_RxLxHxh, key_RxLxKxh, value_RxLxKxh, allowed)


def packed_segments(num_rows: int, length: int, longest: int) -> np.ndarray:
    """Rows of segments between a quarter of the longest and the longest, int32 [R, L]."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_rows):
        sizes = np.concatenate([[longest], rng.integers(longest // 4, longest + 1, 4 * length // longest)])
        rows.append(np.repeat(np.arange(1, len(sizes) + 1), sizes)[:length])
    return np.stack(rows).astype(np.int32)


def cases(length: int, longest: int) -> dict[str, Callable[..., jax.Array]]:
    """The ways to attend, and the one that the back end takes by itself."""
    return {
        "dense": dense,
        "in turns": functools.partial(xla.attend_in_turns, reach=length),
        "in turns within reach": functools.partial(xla.attend_in_turns, reach=longest),
        "locally": functools.partial(xla.attend_locally, reach=longest),
        "chosen": functools.partial(xla.attend, longest_segment=longest),
    }


def measure(length: int, longest: int, steps: int) -> None:
    """Compiles the cases of a group and runs them in turns."""
    rows = max(TOKENS // length, 1)
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weight = (
        jax.random.normal(k, (rows, length, heads, WIDTH))
        for k, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
    )
    segments = jnp.asarray(packed_segments(rows, length, longest))
    compiled, seconds = {}, {}
    for name, attend in cases(length, longest).items():

        def loss(query: jax.Array, key: jax.Array, value: jax.Array, attend: Callable = attend) -> jax.Array:
            return (attend(query, key, value, segments) * weight).sum()

        compiled[name] = jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, value).compile()
        seconds[name] = []
    for _ in range(steps + 1):
        for name, gradients in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(gradients(query, key, value))
            seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    for name in compiled:
        line = {
            "row_length": length,
            "longest_segment": longest,
            "case": name,
            "milliseconds": round(1000 * median[name], 2),
            "ratio": round(median[name] / median["dense"], 3),
            "temporary_mib": round(compiled[name].memory_analysis().temp_size_in_bytes / 2**20, 1),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    """Measures every group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each case, after one that warms up")
    args = parser.parse_args()
    for length, longest in GROUPS:
        measure(length, longest, args.steps)


if __name__ == "__main__":
    main()
