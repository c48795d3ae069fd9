# SPDX-License-Identifier: Apache-2.0
"""One JSONL line to a record: a conversation and its two views."""

import dataclasses
import json
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.chat import ROLES, Message

SHAPES = (
    '{"messages": [...]} with an optional system turn, then user and assistant turns, or {"text": ..., "code": ...}'
)


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation that ends with the assistant, and the two views of the same thing."""

    messages: tuple[Message, ...]
    text: str
    """Text view: the last user turn, unless the line names another."""
    code: str
    """Code view: the last assistant turn, unless the line names another."""


def parse_record(line: str, where: str) -> Record:
    """Reads one JSONL line; `where` is its `file:line`.

    Raises:
        UserError: one line with `where`, what is wrong and what would be right.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON at column {error.colno} ({error.msg}); each line is one record") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: a record is a JSON object, not {type(value).__name__}; use {SHAPES}")
    unknown = sorted(set(value) - {"messages", "text", "code"})
    if unknown:
        raise UserError(f"{where}: unknown key `{unknown[0]}`; a record is {SHAPES}")
    views = _views(value, where)
    if "messages" not in value:
        if views is None:
            raise UserError(f"{where}: missing key `messages` (or `text` and `code`); a record is {SHAPES}")
        return Record((Message("user", views[0]), Message("assistant", views[1])), *views)
    messages = _messages(value["messages"], where)
    return Record(messages, *(views or (messages[-2].content, messages[-1].content)))


def _views(value: dict[str, Any], where: str) -> tuple[str, str] | None:
    given = [name for name in ("text", "code") if name in value]
    if not given:
        return None
    if len(given) == 1:
        missing = "code" if given == ["text"] else "text"
        raise UserError(f"{where}: `{given[0]}` without `{missing}`; the two views come together")
    return _content(value["text"], "text", where), _content(value["code"], "code", where)


def _content(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: `{name}` is {type(value).__name__}; it must be a string")
    if not value.strip():
        raise UserError(f"{where}: `{name}` is empty; drop the record or fill it")
    return value


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `messages` must be a list of turns; a record is {SHAPES}")
    messages = []
    for number, turn in enumerate(value):
        name = f"messages[{number}]"
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise UserError(f'{where}: `{name}` must be {{"role": ..., "content": ...}}, nothing more or less')
        if turn["role"] not in ROLES:
            raise UserError(f"{where}: `{name}.role`={turn['role']!r}; use one of {', '.join(ROLES)}")
        messages.append(Message(turn["role"], _content(turn["content"], f"{name}.content", where)))
    roles = [message.role for message in messages]
    start = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[start:]):
        expected = "user" if number % 2 == 0 else "assistant"
        if role != expected:
            raise UserError(
                f"{where}: `messages[{start + number}].role`={role!r} out of order; {expected!r} comes here"
            )
    if roles[-1] != "assistant":
        raise UserError(f"{where}: the conversation ends with {roles[-1]!r}; its last turn must be the assistant's")
    return tuple(messages)
