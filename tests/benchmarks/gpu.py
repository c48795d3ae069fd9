# SPDX-License-Identifier: Apache-2.0
"""One GPU: attention kernels, whole training steps of Llama 3.2 1B's shape, and answers: one JSON line a case.

`python tests/benchmarks/gpu.py synth_train.jsonl` trains a small tokenizer, packs the file, and measures. Attention is
compared with a dense float32 reference first. Each step has what the planner's arithmetic says of it beside it. Cases
are left out, and named, when `--seconds` are over.
"""

import argparse
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.config import Config, freeze
from llm_jepa_jax.data.pipeline import TrainData, make_train_data
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.eval.generate import Generator, Vocabulary
from llm_jepa_jax.flops import model_flops
from llm_jepa_jax.models.attention import triton, xla
from llm_jepa_jax.models.attention.dense import attend_masked
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import global_batch, placed_batch
from llm_jepa_jax.plan.search import by_arithmetic
from llm_jepa_jax.plan.topology import parse_topology
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.text.tokenizer import Tokenizer, train_tokenizer
from llm_jepa_jax.train.metrics import device_peak_flops
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step

MODEL = {
    "vocab_size": 128256, "embed_dim": 2048, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "head_dim": 64,
    "mlp_dim": 8192,
}  # fmt: skip
OFF = {"jepa": {"weight": 0.0}}
STEPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ntp": ("shared", OFF, {}),
    "shared k=1": ("shared", {}, {}),
    "separate k=1": ("separate", {}, {}),
    "shared k=1 LD 0.75": ("shared", {"jepa": {"dropout": 0.75}}, {}),
    "ntp, attention xla": ("shared", OFF, {"attention": "xla"}),
    "ntp, remat full": ("shared", OFF, {"remat": "full"}),
}
"""Layout, objective and mechanics of each case."""


def show(**line: Any) -> None:
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def seconds_of(function: Callable[[], Any], times: int) -> float:
    """Median of whole calls, the first two left out."""
    spent = []
    for _ in range(times + 2):
        start = time.perf_counter()
        jax.block_until_ready(function())
        spent.append(time.perf_counter() - start)
    return float(np.median(spent[2:]))


def attention(name: str, length: int, longest: int, heads: int = 32, kv_heads: int = 8, width: int = 64) -> None:
    """Both back ends against the dense reference in float32, and their time."""
    keys = jax.random.split(jax.random.key(0), 4)
    rows, shapes = 16384 // length, (heads, kv_heads, kv_heads, heads)
    query, key, value, weight = (
        jax.random.normal(k, (rows, length, n, width), jnp.bfloat16) for k, n in zip(keys, shapes, strict=True)
    )
    segments = jnp.broadcast_to(jnp.arange(length) // longest + 1, (rows, length)).astype(jnp.int32)

    def reference(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        causal = jnp.arange(length)[:, None] >= jnp.arange(length)
        allowed = causal & (segments[:1, :, None] == segments[:1, None, :])
        return attend_masked(query, key, value, allowed)

    kernels = {
        "triton": lambda *arrays: triton.attend(*arrays, segments),
        "xla": lambda *arrays: xla.attend(*arrays, segments, longest),
    }
    with jax.default_matmul_precision("highest"):
        row = [array[:1].astype(jnp.float32) for array in (query, key, value)]
        right = jax.jit(value_and_gradients(reference, weight[:1]))(*row)
    for kernel, attend in kernels.items():
        run = jax.jit(value_and_gradients(attend, weight))
        got = run(query, key, value)
        errors = [
            float(jnp.linalg.norm(ours[:1].astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs))
            for ours, theirs in zip(got, right, strict=True)
        ]
        show(
            case=f"attention {name}, {kernel}", relative_error_of_out_dq_dk_dv=[round(error, 5) for error in errors],
            ms=1e3 * seconds_of(functools.partial(run, query, key, value), 10),
        )  # fmt: skip


def value_and_gradients(attend: Callable[..., jax.Array], weight: jax.Array) -> Callable[..., tuple[jax.Array, ...]]:
    """The output, and the gradients of its product with `weight`."""

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
        out, backward = jax.vjp(attend, query, key, value)
        return out, *backward(weight.astype(out.dtype))

    return run


def config_of(name: str, args: argparse.Namespace, cache_dir: str) -> Config:
    layout, objective, train = STEPS[name]
    data = {"layout": layout, "row_length": 2048, "rows_per_step": args.rows, "row_buckets": 1, "cache_dir": cache_dir}
    return freeze(
        {
            "model": MODEL,
            "objective": {**objective, "ntp": {"targets": "all"}},
            "data": data,
            "train": {"num_steps": 100, "num_epochs": 0, "dtype": "bfloat16", "remat": "dots", **train},
        }
    )


def step(name: str, source: JsonlSource, tokenizer: Tokenizer, args: argparse.Namespace, cache_dir: str) -> None:
    """One kind of training step."""
    config = config_of(name, args, cache_dir)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    config = resolve(config, mesh.shape)
    data: TrainData = make_train_data(config, tokenizer, source, np.ones(len(source)))
    kind, factory = data.kinds[0], state_factory(config, mesh, 100)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        jitted = make_train_step(factory, 100, kind.row.longest_segment)
        compiled = jitted.lower(factory.abstract, placed_batch(mesh, kind.rows, kind.row)).compile()
    compile_seconds = time.perf_counter() - start
    memory, state, values = compiled.memory_analysis(), factory.create(), next(data.iterator(0))
    batch, spent, losses = global_batch(mesh, values), [], []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["last"]["total_loss"]))
        spent.append(time.perf_counter() - start)
    seconds = float(np.median(spent[2:]))
    tokens, targets = int((values["segments"] > 0).sum()), int((values["target_weight"] > 0).sum())
    flops = model_flops(config.model, tokens, targets, kind.row.longest_segment)
    peak = device_peak_flops(jax.devices()[0].device_kind) or float("nan")
    estimate = by_arithmetic(config, kind.row, parse_topology("gpu:h100x1"), mesh, factory.abstract)
    show(
        case=name, ms=1e3 * seconds, tokens_per_s=tokens / seconds, ms_an_example=1e3 * seconds / int(
            values["num_examples"].sum()), tflops=flops / seconds / 1e12, share_of_peak=flops / seconds / peak,
        gib=(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        planned_ms=1e3 * estimate.timeline.seconds, planned_gib=estimate.memory.peak / 2**30,
        first_loss=losses[0], last_loss=losses[-1], compile_s=compile_seconds,
    )  # fmt: skip


def answers(source: JsonlSource, tokenizer: Tokenizer, cache_dir: str, args: argparse.Namespace) -> None:
    """Answers of 64 tokens to real prompts, all together and one at a time; weights are random, so none ends early."""
    config = config_of("ntp", args, cache_dir)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params = state_factory(config, mesh, 1).create().params
    prompts = [tokenizer.encode(record.messages[0].content) for record in list(source)[:512]]
    endless = Vocabulary(tokenizer.vocab_size, ())
    for size in (512, 64, 1):
        generator = Generator(config.model, endless, mesh, 64, size, jnp.bfloat16)
        chosen = prompts[: 4 if size == 1 else 512]
        generator(params, chosen[:size])
        start = time.perf_counter()
        made = generator(params, chosen)
        spent = time.perf_counter() - start
        show(
            case=f"answers, {size} together", answers_per_s=len(chosen) / spent,
            tokens_per_s=sum(len(ids) for ids, _ in made) / spent,
        )  # fmt: skip


def main() -> None:
    """Runs the cases, the most telling ones first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="JSONL file of records")
    parser.add_argument("--rows", type=int, default=8, help="rows of 2,048 tokens a step")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a case")
    parser.add_argument("--seconds", type=float, default=600.0, help="after these no case is begun")
    args = parser.parse_args()
    source, begin = JsonlSource(args.file), time.monotonic()
    tokenizer = train_tokenizer((m.content for record in source for m in record.messages), 2048)
    with tempfile.TemporaryDirectory() as cache_dir:
        cases: list[tuple[str, Callable[[], None]]] = [
            (name, functools.partial(step, name, source, tokenizer, args, cache_dir)) for name in STEPS
        ]
        cases.insert(4, ("answers", functools.partial(answers, source, tokenizer, cache_dir, args)))
        cases.append(("attention, short", functools.partial(attention, "segments of 64 in 2,048", 2048, 64)))
        cases.append(("attention, long", functools.partial(attention, "one segment of 4,096", 4096, 4096)))
        for name, run in cases:
            if time.monotonic() - begin > args.seconds:
                show(case=name, left_out=f"{args.seconds:.0f} s are over")
                continue
            try:
                run()
            except Exception as error:  # the others still have something to say
                show(case=name, error=str(error)[:2000])


if __name__ == "__main__":
    main()
