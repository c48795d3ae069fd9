# SPDX-License-Identifier: Apache-2.0
"""How near the training step comes to what this machine can do: `python tests/benchmarks/roofline.py train.jsonl`.

Measures the machine (the best product of two matrices of the step's sizes, and the best stream through memory), counts
the FLOPs that training needs (padding not counted), and times the step of `objectives.py`'s first case. One JSON line
each; `bound_s_by_matmul` is the least time that the products allow.
"""

import argparse
import json
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from objectives import MODEL, make_case

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.flops import model_flops
from llm_jepa_jax.huge_pages import use_huge_pages
from llm_jepa_jax.models.ops import linear
from llm_jepa_jax.text.tokenizer import train_tokenizer


def fastest(work: Callable[[], object], turns: int = 20) -> float:
    """Seconds of the fastest turn."""
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def machine(tokens: int) -> tuple[float, float]:
    """FLOP/s of the best of the step's products (forward and backward), and bytes/s of a sum of two long arrays."""
    rates = []
    widths = ((MODEL["embed_dim"], MODEL["mlp_dim"]), (MODEL["mlp_dim"], MODEL["embed_dim"]))
    for width_in, width_out in widths:
        x, grad = (jnp.ones((1, tokens, width)) for width in (width_in, width_out))
        weight = jnp.ones((width_in, width_out))
        both = jax.jit(lambda x, w, g: (linear(x, w), *jax.vjp(linear, x, w)[1](g)))
        rates.append(6 * tokens * width_in * width_out / fastest(lambda: both(x, weight, grad)))  # noqa: B023
    a = jnp.ones(1 << 26)
    stream = 3 * a.nbytes / fastest(lambda: jnp.add(a, a))
    return max(rates), stream


def main() -> None:
    """Prints the machine, the step and the bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="JSONL file of records")
    parser.add_argument("--pieces", type=int, default=2048, help="pieces of the tokenizer")
    parser.add_argument("--row_length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    flops, stream = machine(args.tokens // args.micro_batches)
    print(json.dumps({"machine": "matmul", "gflop_per_s": round(flops / 1e9)}))
    print(json.dumps({"machine": "memory", "gbyte_per_s": round(stream / 1e9, 1)}))
    source = JsonlSource(args.file)
    tokenizer = train_tokenizer((m.content for record in source for m in record.messages), args.pieces)
    with tempfile.TemporaryDirectory() as cache_dir:
        case = make_case("ntp", source, tokenizer, args, cache_dir)
        for _ in range(args.steps + 1):
            case.take_turn()
        targets = float(next(case.batches)["target_weight"].sum())
    seconds = float(np.median(case.seconds[1:]))
    tokens = float(np.mean(case.tokens[1:]))
    needed = model_flops(ModelConfig(**MODEL), tokens, targets, int(tokens / np.mean(case.examples[1:])))
    line = {
        "step_s": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds),
        "gflop": round(needed / 1e9, 1),
        "gflop_per_s": round(needed / seconds / 1e9),
        "bound_s_by_matmul": round(needed / flops, 3),
        "share_of_matmul_peak": round(needed / flops / seconds, 3),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    use_huge_pages()
    main()
