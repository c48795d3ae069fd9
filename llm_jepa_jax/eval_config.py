# SPDX-License-Identifier: Apache-2.0
"""The keys of generation and scoring: the section `eval` of the schema in `config.py`."""

import dataclasses
import math
import numbers

from llm_jepa_jax.schema import key


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every_steps: int = key(0, "evaluate during training with this period, then save; 0: only at the end", "steps")
    num_examples: int = key(256, "examples of an evaluation during training", "records")
    final_examples: int = key(0, "examples of the evaluation at the end and of `--mode=eval`; 0: all", "records")
    tasks: str = key(
        "exact_match",
        "what is scored, names of [tasks](tasks.md) with commas between them; the first one's score says which "
        "checkpoints are best. Tasks with the same prompts share their answers",
    )
    max_new_tokens: int = key(128, "longest answer generated", "tokens")
    batch_size: int = key(
        0,
        "prompts answered, or sequences whose probability is wanted, together, over all devices; 0: as many as their "
        "memory holds, a power of two for each of `mesh`'s row shards",
        "sequences",
    )
    temperature: float = key(
        0.0,
        "logits of the next token are divided by it, and one is drawn from (`seed`, prompt, step); 0: greedy, always "
        "the most probable one",
    )
    top_k: int = key(0, "draw from so many of the most probable tokens; 0: from all", "tokens")
    top_p: float = key(
        1.0, "draw from the fewest of the most probable tokens whose probabilities reach this; 1: from all"
    )
    databases: str = key("", "spider: directory with `NAME/NAME.sqlite` of every database that questions name")
    sql_seconds: float = key(5.0, "spider: longest time of one query, after which it has no result", "seconds")


def sampling_fault(temperature: float, top_k: int, top_p: float) -> tuple[str, object, str] | None:
    """The setting of sampling that is wrong, its value, and what would be right; None: none is."""
    if not isinstance(temperature, numbers.Real) or not 0 <= temperature < math.inf:
        return "temperature", temperature, "is no temperature; use 0 (greedy) or a number above it"
    if not isinstance(top_k, numbers.Integral) or top_k < 0:
        return "top_k", top_k, "is no number of tokens; use 0 (off) or a whole number above it"
    if not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        return "top_p", top_p, "is no share to draw from; use a number above 0, up to 1 (off)"
    for name, value, off in (("top_k", top_k, 0), ("top_p", top_p, 1)):
        if not temperature and value != off:
            return name, value, f"has no effect with temperature 0 (greedy); leave it at {off}, or set a temperature"
    return None
