# SPDX-License-Identifier: Apache-2.0
"""Attention forward and backward, `xla` against what it replaces: python tests/benchmarks/attention.py

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

from llm_jepa_jax.huge_pages import use_huge_pages
from llm_jepa_jax.models.attention import xla
from llm_jepa_jax.models.attention.dense import attend_masked

GROUPS = ((512, 60), (512, 200), (2048, 60), (2048, 512), (4096, 2048))
"""Row length and longest segment."""
TOKENS, HEADS, KV_HEADS, WIDTH = 4096, 4, 2, 64


def packed_segments(num_rows: int, length: int, longest: int) -> np.ndarray:
    """Rows of segments between a quarter of the longest and the longest, int32 [R, L]."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_rows):
        sizes = np.concatenate([[longest], rng.integers(longest // 4, longest + 1, 4 * length // longest)])
        rows.append(np.repeat(np.arange(1, len(sizes) + 1), sizes)[:length])
    return np.stack(rows).astype(np.int32)


def in_turns(
    query_RxLxHxh: jax.Array, key_RxLxKxh: jax.Array, value_RxLxKxh: jax.Array, segments_RxL: jax.Array
) -> jax.Array:
    """Blocks of 256 queries against every key before their end, scores computed again in the backward pass."""
    outputs = []
    for start in range(0, segments_RxL.shape[1], 256):
        arrays = (array[:, : start + 256] for array in (key_RxLxKxh, value_RxLxKxh, segments_RxL))
        outputs.append(jax.checkpoint(last_queries)(query_RxLxHxh[:, start : start + 256], *arrays))
    return jnp.concatenate(outputs, axis=1)


def last_queries(
    query_RxQxHxh: jax.Array, key_RxSxKxh: jax.Array, value_RxSxKxh: jax.Array, segments_RxS: jax.Array
) -> jax.Array:
    """The last Q places of S attend to those before them."""
    start = segments_RxS.shape[1] - query_RxQxHxh.shape[1]
    causal_QxS = start + jnp.arange(query_RxQxHxh.shape[1])[:, None] >= jnp.arange(segments_RxS.shape[1])
    allowed_RxQxS = causal_QxS & (segments_RxS[:, start:, None] == segments_RxS[:, None, :])
    return attend_masked(query_RxQxHxh, key_RxSxKxh, value_RxSxKxh, allowed_RxQxS)


def one_segment(*arrays: jax.Array) -> jax.Array:
    """The back end where nothing can be skipped but what lies ahead."""
    return xla.attend(*arrays[:3], jnp.ones_like(arrays[3]))


CASES: dict[str, Callable[..., jax.Array]] = {
    "dense": last_queries,
    "in turns": in_turns,
    "blocks": xla.attend,
    "blocks, one segment": one_segment,
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
    for name, attend in (CASES | {"blocks, promise": functools.partial(xla.attend, longest_segment=longest)}).items():

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
    use_huge_pages()
    main()
