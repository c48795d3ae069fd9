# SPDX-License-Identifier: Apache-2.0
"""Our step against PyTorch's on equal shapes and records: one JSON line a case. Needs the `parity` extra.

`python tests/benchmarks/pytorch.py synth_train.jsonl` measures transformers' Llama with AdamW, float32, in the recipes
people use: the three-pass JEPA recipe padded to a fixed length (the published one, at 512 and at 128), and next-token
training with every batch padded to its longest record, like lengths together. Cases take turns, two steps each.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from objectives import MODEL, Case, make_case
from transformers import LlamaConfig, LlamaForCausalLM

from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.huge_pages import use_huge_pages
from llm_jepa_jax.models.ops import linear
from llm_jepa_jax.text.chat import render, render_view
from llm_jepa_jax.text.tokenizer import Tokenizer, train_tokenizer

PAUSE = 0.3
"""Seconds before each measurement: PyTorch's threads spin for a while after their work, at the next one's cost."""


def make_model() -> LlamaForCausalLM:
    """transformers' Llama of the benchmark's shape."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=MODEL["vocab_size"],
            hidden_size=MODEL["embed_dim"],
            num_hidden_layers=MODEL["num_layers"],
            num_attention_heads=MODEL["num_heads"],
            num_key_value_heads=MODEL["num_kv_heads"],
            head_dim=MODEL["head_dim"],
            intermediate_size=MODEL["mlp_dim"],
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def padded(sequences: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, length], padded on the right."""
    ids = torch.zeros((len(sequences), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


@dataclasses.dataclass
class TorchCase:
    """One recipe with its own model and optimizer."""

    name: str
    records: list[tuple[list[int], list[int], list[int]]]
    length: int
    """Tokens every sequence is padded to; 0: to the batch's longest."""
    jepa: bool
    tokens: int
    """Tokens of a batch, padding included (of one pass)."""

    def __post_init__(self) -> None:
        self.model = make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.1)
        self.batches = self._batches()
        self.example_seconds: list[float] = []
        self.token_seconds: list[float] = []

    def _batches(self) -> Iterator[list[int]]:
        rng = np.random.default_rng(0)
        lengths = np.array([len(record[0]) for record in self.records])
        size = self.tokens // (self.length or round(lengths.mean()))
        while True:
            order = rng.permutation(len(lengths))
            if not self.length:  # like lengths together, batches in random order
                order = order[np.argsort(lengths[order] + rng.uniform(0, 4, len(order)), kind="stable")]
            chunks = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
            for number in rng.permutation(len(chunks)):
                yield chunks[number].tolist()

    def take_turn(self) -> None:
        """Two steps, as training has them one after the other; the second is measured."""
        for _ in range(2):
            chosen = [self.records[i] for i in next(self.batches)]
            start = time.perf_counter()
            self.optimizer.zero_grad()
            self._loss(chosen).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            seconds = time.perf_counter() - start
        self.example_seconds.append(seconds / len(chosen))
        self.token_seconds.append(
            seconds / sum(len(part) for record in chosen for part in record[: 3 if self.jepa else 1])
        )

    def per_example(self) -> np.ndarray:
        """Seconds an example of each step after the first."""
        return np.array(self.example_seconds[1:])

    def per_token(self) -> np.ndarray:
        """Seconds a token, padding not counted, of each step after the first."""
        return np.array(self.token_seconds[1:])

    def _loss(self, chosen: list[tuple[list[int], list[int], list[int]]]) -> torch.Tensor:
        whole = [record[0] for record in chosen]
        ids, mask = padded(whole, self.length or max(map(len, whole)))
        labels = torch.where(mask > 0, ids, -100)
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=self.jepa).loss
        if not self.jepa:
            return loss
        ends = []
        for part in (1, 2):
            views = [record[part] for record in chosen]
            ids, mask = padded(views, self.length)
            states = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
            ends.append(states[torch.arange(len(views)), mask.sum(1) - 1])
        return loss + 1.0 - torch.nn.functional.cosine_similarity(ends[0], ends[1]).mean()


def token_records(source: JsonlSource, tokenizer: Tokenizer) -> list[tuple[list[int], list[int], list[int]]]:
    """Conversation, text view with one predictor, and code view of every record."""
    out = []
    for i in range(len(source)):
        record = source[i]
        (pair,) = record.pairs("last")
        text = [*render_view(tokenizer, "user", pair.text).tokens, tokenizer.predictor_ids[0]]
        code = render_view(tokenizer, "assistant", pair.code).tokens
        out.append((render(tokenizer, record.messages).tokens.tolist(), text, code))
    return out


def main() -> None:
    """Runs every case in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="JSONL file of records")
    parser.add_argument("--pieces", type=int, default=2048, help="pieces of the tokenizer")
    parser.add_argument("--row_length", type=int, default=512, help="tokens of our packed row")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step, padding included")
    parser.add_argument("--micro_batches", type=int, default=4, help="parts of our step")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each case")
    parser.add_argument("--dtype", default="float32", help="our compute type")
    args = parser.parse_args()
    torch.set_num_threads(2)
    source = JsonlSource(args.file)
    tokenizer = train_tokenizer((m.content for record in source for m in record.messages), args.pieces)
    records = token_records(source, tokenizer)
    settings = (
        ("torch three-pass, 512", 512, True),
        ("torch three-pass, 128", 128, True),
        ("torch ntp, dynamic", 0, False),
    )
    torch_cases = [TorchCase(name, records, n, jepa, args.tokens) for name, n, jepa in settings]
    with tempfile.TemporaryDirectory() as cache_dir:
        ours = [make_case(name, source, tokenizer, args, cache_dir) for name in ("ntp", "shared k=1", "separate k=1")]
        cases: list[Any] = [*torch_cases, *ours]
        for _ in range(args.steps + 1):
            for case in cases:
                time.sleep(PAUSE)
                case.take_turn()
    report(torch_cases, ours)
    matmuls(args.tokens // args.micro_batches)


def matmuls(tokens: int, turns: int = 15) -> None:
    """Forward and backward of each of the model's products, ours over PyTorch's: median times, in turns."""
    width, heads = MODEL["embed_dim"], MODEL["num_heads"] * MODEL["head_dim"]
    for width_in, width_out in ((width, heads), (width, MODEL["mlp_dim"]), (MODEL["mlp_dim"], width)):
        rng = np.random.default_rng(0)
        shapes = ((1, tokens, width_in), (width_in, width_out), (1, tokens, width_out))
        x, weight, grad = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        theirs = [torch.tensor(x, requires_grad=True), torch.tensor(weight.T.copy(), requires_grad=True)]
        torch_grad, ours = torch.tensor(grad), [jnp.asarray(array) for array in (x, weight, grad)]
        both = jax.jit(lambda x, w, g: (linear(x, w), *jax.vjp(linear, x, w)[1](g)))
        seconds: dict[str, list[float]] = {"torch": [], "ours": []}
        for _ in range(turns + 1):
            time.sleep(PAUSE)
            start = time.perf_counter()
            torch.autograd.grad(torch.nn.functional.linear(*theirs), theirs, torch_grad)
            seconds["torch"].append(time.perf_counter() - start)
            time.sleep(PAUSE)
            start = time.perf_counter()
            jax.block_until_ready(both(*ours))
            seconds["ours"].append(time.perf_counter() - start)
        torch_s, ours_s = (float(np.median(seconds[name][1:])) for name in ("torch", "ours"))
        rate = 6 * tokens * width_in * width_out / 1e9
        line = {
            "case": f"matmul {tokens} x {width_in} x {width_out}",
            "torch_gflop_per_s": round(rate / torch_s),
            "ours_gflop_per_s": round(rate / ours_s),
            "times torch": round(torch_s / ours_s, 2),
        }
        print(json.dumps(line), flush=True)


def report(torch_cases: list[TorchCase], ours: list[Case]) -> None:
    """Speeds of all, and ours over PyTorch's."""
    cases = {case.name: case for case in (*torch_cases, *ours)}
    for name, case in cases.items():
        line: dict[str, Any] = {
            "case": name,
            "examples_per_s": round(1 / float(np.median(case.per_example())), 2),
            "real_tokens_per_s": round(1 / float(np.median(case.per_token()))),
        }
        if name in {case.name for case in ours}:
            against = ["torch ntp, dynamic"] if name == "ntp" else ["torch three-pass, 512", "torch three-pass, 128"]
            for other in against:
                ratios = cases[other].per_example() / case.per_example()
                line[f"times {other}"] = round(float(np.median(ratios)), 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    use_huge_pages()
    main()
