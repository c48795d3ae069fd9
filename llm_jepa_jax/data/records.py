# SPDX-License-Identifier: Apache-2.0
"""One JSONL line to records: conversations with their pairs of views, paraphrases, and plain text."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.chat import ROLES, VIEW_ROLES, Message

SHAPES = (
    '{"messages": [...]} with an optional system turn, then user and assistant turns; {"text": ..., "code": ...}; '
    '{"group": [...]} of paraphrases; or {"text": ...} alone'
)
KEYS = ("messages", "text", "code", "pairs", "group")


class Pair(NamedTuple):
    """Two views of the same thing."""

    text: str
    code: str
    turn: int
    """The user turn whose content the text is: its number in `messages`; -1: none."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation that ends with the assistant, with its pairs; or plain text, whose views are cut in training."""

    messages: tuple[Message, ...] = ()
    named: tuple[Pair, ...] = ()
    """Pairs that the line names; without any, they are those of the turns."""
    document: str = ""
    """Plain text, where there is no conversation."""

    def pairs(self, which: str) -> tuple[Pair, ...]:
        """The pairs of views under `data.pairs`; none for plain text."""
        if self.named or not self.messages:
            return self.named
        users = [number for number, message in enumerate(self.messages) if message.role == "user"]
        chosen = users if which == "turns" else users[-1:]
        return tuple(Pair(self.messages[i].content, self.messages[i + 1].content, i) for i in chosen)

    def contents(self) -> Iterator[str]:
        """All that it says: what a tokenizer is trained on."""
        yield from [self.document] if self.document else (message.content for message in self.messages)


def exchange(user: str, assistant: str) -> Record:
    """A conversation of one question and its answer, which are its views."""
    return Record((Message("user", user), Message("assistant", assistant)))


def parse_records(line: str, where: str) -> tuple[Record, ...]:
    """Reads one JSONL line, which is one record or, of a group of n paraphrases, n − 1; `where` is its `file:line`.

    Raises:
        UserError: one line with `where`, what is wrong and what would be right.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON at column {error.colno} ({error.msg}); each line is one record") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: a record is a JSON object, not {type(value).__name__}; use {SHAPES}")
    unknown = sorted(set(value) - set(KEYS))
    if unknown:
        raise UserError(f"{where}: unknown key `{unknown[0]}`; a record is {SHAPES}")
    if "group" in value:
        return _group(value, where)
    if "pairs" in value and "messages" not in value:
        raise UserError(f"{where}: `pairs` without `messages`; they are pairs of views of a conversation")
    if set(value) == {"text"}:
        return (Record(document=_content(value["text"], "text", where)),)
    if "messages" not in value:
        if not value:
            raise UserError(f"{where}: missing key `messages` (or `text`, or `group`); a record is {SHAPES}")
        return (exchange(*_views(value, "", where)),)
    messages = _messages(value["messages"], where)
    return (Record(messages, _named(value, messages, where)),)


def _group(value: dict[str, Any], where: str) -> tuple[Record, ...]:
    """Each member with the next one as its answer."""
    if len(value) > 1:
        other = next(key for key in value if key != "group")
        raise UserError(f"{where}: `group` beside `{other}`; a group of paraphrases is a line of its own")
    members = value["group"]
    if not isinstance(members, list) or len(members) < 2:
        raise UserError(f'{where}: `group` must be a list of two paraphrases or more, such as ["a b", "b, that is a"]')
    contents = [_content(member, f"group[{number}]", where) for number, member in enumerate(members)]
    return tuple(exchange(*two) for two in zip(contents, contents[1:], strict=False))


def _named(value: dict[str, Any], messages: tuple[Message, ...], where: str) -> tuple[Pair, ...]:
    """The pairs that a line with a conversation names."""
    views = [name for name in ("text", "code") if name in value]
    if "pairs" not in value:
        return (_pair(_views(value, "", where), messages),) if views else ()
    if views:
        raise UserError(f"{where}: `pairs` beside `{views[0]}`; `pairs` comes in place of `text` and `code`")
    if not isinstance(value["pairs"], list) or not value["pairs"]:
        raise UserError(f'{where}: `pairs` must be a list of {{"text": ..., "code": ...}}; leave it out or fill it')
    pairs = []
    for number, pair in enumerate(value["pairs"]):
        if not isinstance(pair, dict) or set(pair) != {"text", "code"}:
            raise UserError(f'{where}: `pairs[{number}]` must be {{"text": ..., "code": ...}}, nothing more or less')
        pairs.append(_pair(_views(pair, f"pairs[{number}].", where), messages))
    return tuple(pairs)


def _pair(views: tuple[str, str], messages: tuple[Message, ...]) -> Pair:
    turns = [i for i, message in enumerate(messages) if message == Message("user", views[0])]
    return Pair(*views, turns[-1] if turns else -1)


def _views(value: dict[str, Any], prefix: str, where: str) -> tuple[str, str]:
    for name, other in (("text", "code"), ("code", "text")):
        if name not in value:
            raise UserError(f"{where}: `{other}` without `{name}`; the two views come together")
    text, code = (_view(value[name], role, prefix + name, where) for name, role in VIEW_ROLES.items())
    return text, code


def _view(value: Any, role: str, name: str, where: str) -> str:
    """A view's content, which may also be written as a list of one turn (the published HellaSwag files)."""
    if not isinstance(value, list):
        return _content(value, name, where)
    turn = value[0] if len(value) == 1 else None
    if not isinstance(turn, dict) or set(turn) != {"role", "content"} or turn["role"] != role:
        raise UserError(
            f'{where}: `{name}` is a list; it must be a string, or one turn [{{"role": "{role}", "content": ...}}]'
        )
    return _content(turn["content"], f"{name}[0].content", where)


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
