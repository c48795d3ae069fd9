# SPDX-License-Identifier: Apache-2.0
"""What a task asks of a model about each record: a prompt to go on from, or sequences whose probability is wanted."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.data.records import Record
from llm_jepa_jax.data.sources import Source
from llm_jepa_jax.eval.likelihood import Question
from llm_jepa_jax.eval.task import AnswerTask, AnyTask, ChoiceTask, LikelihoodTask, Skip
from llm_jepa_jax.text.chat import Message, render, render_document, render_prompt
from llm_jepa_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Item:
    """A record that a task asks."""

    where: str
    """`file:line`"""
    record: Record
    target: str
    prompt: tuple[int, ...] = ()
    """Token ids to go on from; empty where probabilities are wanted."""
    options: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    """One for each option, or the record itself."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task with its records, those asked and those not."""

    task: AnyTask
    items: list[Item]
    skipped: list[tuple[str, str]]
    """(`file:line`, reason)"""

    def reasons(self) -> dict[str, int]:
        """How many records were skipped, by reason."""
        return dict(collections.Counter(reason for _, reason in self.skipped))


Render = Callable[[tuple[Message, ...]], tuple[int, ...]]
"""Turns to the token ids of their prompt."""


def cached_render(tokenizer: Tokenizer) -> Render:
    """Renders equal prompts once: tasks ask the same ones."""
    return functools.cache(lambda turns: tuple(render_prompt(tokenizer, turns)))


def ask(
    task: AnyTask, source: Source, indices: Sequence[int], tokenizer: Tokenizer, rendered: Render, model: ModelConfig
) -> Asked:
    """Turns records into what the task asks about them."""
    asked = Asked(task, [], [])
    for index in indices:
        record, where = source[index], source.location(index)
        try:
            asked.items.append(_item(task, record, where, tokenizer, rendered, model.max_positions))
        except Skip as skip:
            asked.skipped.append((where, str(skip)))
    return asked


def _item(task: AnyTask, record: Record, where: str, tokenizer: Tokenizer, rendered: Render, most: int) -> Item:
    if isinstance(task, LikelihoodTask):
        question = _whole(task, record, tokenizer)
        target = record.messages[-1].content if record.messages else record.document
        return Item(where, record, target, questions=(_fitting(question, most),))
    target, prompt = task.target(record), task.prompt(record)
    if isinstance(task, AnswerTask):
        return Item(where, record, target, prompt=rendered(prompt))
    assert isinstance(task, ChoiceTask)
    options = task.options(record)
    questions = tuple(_fitting(_behind(tokenizer, prompt, option), most) for option in options)
    return Item(where, record, target, options=options, questions=questions)


def _whole(task: LikelihoodTask, record: Record, tokenizer: Tokenizer) -> Question:
    """A record's own tokens behind each other, as training renders them."""
    if record.messages:
        rendered = render(tokenizer, record.messages)
    else:
        rendered = render_document(tokenizer, tokenizer.encode(record.document))
    tokens = tuple(rendered.tokens.tolist())
    wanted = [i for i in range(1, len(tokens)) if task.targets == "all" or rendered.assistant_target[i]]
    return Question(tokens[:-1], tuple((i - 1, tokens[i]) for i in wanted))


def _behind(tokenizer: Tokenizer, prompt: Sequence[Message], option: str) -> Question:
    """The content tokens of an answer behind its prompt, rendered as a conversation."""
    tokens, turns = tokenizer.turns([*prompt, Message("assistant", option)])
    first, end = turns[-1].content
    return Question(tuple(tokens[: end - 1]), tuple((i - 1, tokens[i]) for i in range(first, end)))


def _fitting(question: Question, most: int) -> Question:
    if len(question.tokens) > most:
        raise Skip(f"longer than model.max_positions={most}")
    return question


def merged(questions: Sequence[Question]) -> list[Question]:
    """The same slots with each sequence once: options of one token each are one forward pass."""
    slots: dict[tuple[int, ...], dict[tuple[int, int], None]] = {}
    for question in questions:
        slots.setdefault(question.tokens, {}).update(dict.fromkeys(question.slots))
    return [Question(tokens, tuple(wanted)) for tokens, wanted in slots.items()]
