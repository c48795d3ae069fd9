# SPDX-License-Identifier: Apache-2.0
"""What is asked and what counts as right."""

import dataclasses
from collections.abc import Callable

from llm_jepa_jax.data.records import Record
from llm_jepa_jax.text.chat import Message
from llm_jepa_jax.text.thoughts import without_thought


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompt and verdict of one kind of evaluation."""

    name: str
    prompt: Callable[[Record], tuple[Message, ...]]
    gold: Callable[[Record], str]
    correct: Callable[[str, str], bool]
    """(output, gold) to verdict."""


EXACT_MATCH = Task(
    name="exact_match",
    prompt=lambda record: record.messages[:-1],
    gold=lambda record: without_thought(record.messages[-1].content),
    correct=lambda output, gold: without_thought(output).strip() == gold.strip(),
)

TASKS = {task.name: task for task in (EXACT_MATCH,)}
