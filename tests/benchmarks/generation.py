# SPDX-License-Identifier: Apache-2.0
"""Answers a second: `python tests/benchmarks/generation.py FILE.jsonl`, a file of records such as `synth_test.jsonl`.

The records' own prompts are answered one at a time, as the published script asks, and in batches; and prompts behind
`--shots` solved records, which is one prefix for all, or, with another first token in every second prompt, none.
Weights are random and no answer ends early. One JSON line a case: answers a second and processor seconds an answer, the
medians of `--turns` that take every case in turn; `times` is against the first case of its group. Where torch and
transformers are installed, transformers' Llama of the same shape is asked one at a time too.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from llm_jepa_jax.config import MeshConfig, ModelConfig
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.eval.generate import Generator, Vocabulary
from llm_jepa_jax.huge_pages import use_huge_pages
from llm_jepa_jax.models.transformer import init_params
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.text.chat import Message, render_prompt
from llm_jepa_jax.text.tokenizer import Tokenizer, train_tokenizer

Answer = Callable[[Sequence[Sequence[int]]], Any]


def prompts_of(source: JsonlSource, tokenizer: Tokenizer, count: int, shots: int) -> list[list[int]]:
    """Token ids of the first `count` records' prompts behind so many solved ones (none: their own turns)."""
    records = [source[i] for i in range(count + shots)]
    solved = [message for record in records[count:] for message in record.messages[-2:]]
    made = []
    for record in records[:count]:
        *system, question = record.messages[:-1]
        made.append(render_prompt(tokenizer, [*system, *solved, Message(question.role, question.content)]))
    return made


def theirs(model: ModelConfig, new: int) -> Answer | None:
    """transformers' greedy generation, one prompt at a time; None where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.embed_dim, intermediate_size=model.mlp_dim,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads, head_dim=model.head_dim,
        num_key_value_heads=model.num_kv_heads, max_position_embeddings=model.max_positions, tie_word_embeddings=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.set_num_threads(1)  # of a token's small products, threads that wait for each other are the larger part
    llama = transformers.LlamaForCausalLM(config).eval()

    def answer(prompts: Sequence[Sequence[int]]) -> None:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
            assert out.shape[1] == len(prompt) + new

    return answer


def measure(group: str, cases: list[tuple[str, Answer, list[list[int]]]], turns: int) -> None:
    """Takes the cases in turn; the first turn compiles."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in cases}
    for turn in range(turns + 1):
        for name, answer, prompts in cases:
            begun, busy = time.perf_counter(), time.process_time()
            answer(prompts)
            spent = time.perf_counter() - begun, time.process_time() - busy
            if turn:
                found[name].append((spent[0] / len(prompts), spent[1] / len(prompts)))
    first = None
    for name, _, prompts in cases:
        wall, busy = (statistics.median(times) for times in zip(*found[name], strict=True))
        first = first or (wall, busy)
        print(
            json.dumps({
                "group": group, "case": name, "answers": len(prompts), "answers_per_s": round(1 / wall, 2),
                "cpu_s_an_answer": round(busy, 5), "times": round(first[0] / wall, 2),
                "times_by_cpu": round(first[1] / busy, 2),
            }),
            flush=True,
        )  # fmt: skip


def main() -> None:
    """Runs both groups."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="JSONL file of records")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--alone", type=int, default=8, help="prompts of the cases that ask one at a time")
    parser.add_argument("--sizes", default="16,64,0", help="batches; 0: what memory holds")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--shots", type=int, default=8, help="solved records before the question")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    use_huge_pages()
    source = JsonlSource(args.file)
    tokenizer = train_tokenizer((m.content for record in source for m in record.messages), 1024)
    heads = args.width // 32
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size, embed_dim=args.width, num_layers=args.layers, num_heads=heads,
        num_kv_heads=heads // 2, head_dim=32, mlp_dim=args.width * 8 // 3 // 32 * 32,
    )  # fmt: skip
    params = init_params(jax.random.key(0), model, jnp.float32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def ours(size: int) -> Answer:
        generator = Generator(model, Vocabulary(model.vocab_size, ()), mesh, args.new, size, jnp.float32)
        return lambda prompts: generator(params, prompts)

    prompts = prompts_of(source, tokenizer, args.prompts, 0)
    reference = theirs(model, args.new)
    cases = [("transformers, one at a time", reference, prompts[: args.alone])] if reference else []
    cases.append(("one at a time", ours(1), prompts[: args.alone]))
    sizes = [int(size) for size in args.sizes.split(",")]
    cases += [(f"{size or 'as many as fit'} together", ours(size), prompts) for size in sizes]
    measure("own prompts", cases, args.turns)
    shared = prompts_of(source, tokenizer, args.prompts, args.shots)
    apart = [[prompt[0] + i % 2, *prompt[1:]] for i, prompt in enumerate(shared)]
    fits, mean = ours(0), sum(map(len, shared)) // len(shared)
    measure(
        f"{args.shots} shots, {mean} tokens",
        [("one at a time", ours(1), apart[: args.alone]), ("no prefix", fits, apart), ("shared prefix", fits, shared)],
        args.turns,
    )


if __name__ == "__main__":
    main()
