# SPDX-License-Identifier: Apache-2.0
"""The keys of generation and scoring."""

import dataclasses

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
    batch_size: int = key(256, "prompts answered, or sequences whose probability is wanted, together", "sequences")
    databases: str = key("", "spider: directory with `NAME/NAME.sqlite` of every database that questions name")
    sql_seconds: float = key(5.0, "spider: longest time of one query, after which it has no result", "seconds")
