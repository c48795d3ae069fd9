# SPDX-License-Identifier: Apache-2.0
"""Any data set to JSONL by the names of its columns: `--mode=prepare --columns=text=question,code=query`."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.dataset import Drop, Line

PARTS = ("system", "user", "assistant", "messages", "text", "code", "group", "document")
FORMS = (
    "user=…,assistant=… (with system=… if wanted), messages=COLUMN, text=…,code=…, group=COLUMN, or document=…; "
    'a value is a column\'s name, a template such as For {db_id}:\\n{question}, or "fixed text"'
)
LISTS = ("messages", "group")
PLACE = re.compile(r"\{([^{}]+)\}")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other names of roles in published conversations."""
KINDS = (
    {"user", "assistant"}, {"system", "user", "assistant"}, {"messages"}, {"text", "code"}, {"group"}, {"document"},
)  # fmt: skip
"""Parts that make a record; with `messages`, or user and assistant, `text` and `code` may name views."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """What each part of a record is made of."""

    values: dict[str, str]
    """Templates by part; a column's name alone is one too."""

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys(name for value in self.values.values() for name in PLACE.findall(value)))

    def record(self, row: Mapping[str, Any], where: str) -> Line:
        """The record of a row.

        Raises:
            Drop: a part is blank or missing.
            UserError: a column is missing or of a type that the part cannot be.
        """
        missing = [name for name in self.names if name not in row]
        if missing:
            raise UserError(f"{where}: {no_column(missing[0], row)}")
        made = {part: self._part(part, value, row, where) for part, value in self.values.items()}
        if "document" in made:
            return {"text": made["document"]}
        turns = [{"role": role, "content": made.pop(role)} for role in ("system", "user", "assistant") if role in made]
        return ({"messages": turns} if turns else {}) | made

    def _part(self, part: str, value: str, row: Mapping[str, Any], where: str) -> Any:
        if part in LISTS:
            name = value[1:-1]
            listed = _listed(row[name], name, where)
            return (_messages if part == "messages" else _group)(listed, name, where)
        return PLACE.sub(lambda place: _text(row[place[1]], place[1], where), value)


def parse_columns(text: str) -> Columns:
    r"""`part=column,part=template`; a comma separates only where a part's name and `=` follow; `\n` is a newline.

    Raises:
        UserError: a part is unknown or named twice, or the parts make no record.
    """
    values: dict[str, str] = {}
    for item in re.split(rf",(?=(?:{'|'.join(PARTS)})=)", text):
        part, equals, value = item.partition("=")
        if not equals or part not in PARTS or not value:
            raise UserError(f"--columns={text}: {item!r} is no PART=COLUMN; use {FORMS}")
        if part in values:
            raise UserError(f"--columns={text}: `{part}` comes twice")
        values[part] = _template(value)
        if part in LISTS and not PLACE.fullmatch(values[part]):
            raise UserError(f"--columns={text}: `{part}` takes the name of one column, which holds lists")
    made = set(values)
    views = {"text", "code"}
    if made not in KINDS and not (views < made and made - views in KINDS[:3]):
        raise UserError(f"--columns={text}: these parts make no record; use {FORMS}")
    return Columns(values)


def _template(value: str) -> str:
    if len(value) > 2 and value[0] == value[-1] == '"':
        value = value[1:-1]
    elif not PLACE.search(value):
        return f"{{{value}}}"
    return value.replace("\\n", "\n")


def no_column(name: str, names: Iterable[str]) -> str:
    """What to say of a column that a table lacks."""
    return f'no column `{name}`; the columns are {", ".join(map(str, names))[:200]}, and fixed text is written "{name}"'


def _text(value: Any, name: str, where: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Drop(f"blank `{name}`")
    if isinstance(value, (str, int, float)):
        return str(value)
    raise UserError(f"{where}: column `{name}` is {type(value).__name__}; text or a number belongs in a turn or a view")


def _listed(value: Any, name: str, where: str) -> list[Any]:
    """A list, which CSV files hold as JSON."""
    if value is None or value == "":
        raise Drop(f"blank `{name}`")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{where}: column `{name}` is text that is no JSON list") from error
    if not isinstance(value, list):
        raise UserError(f"{where}: column `{name}` is {type(value).__name__}; a list belongs there")
    return value


def _group(members: list[Any], name: str, where: str) -> list[str]:
    if len(members) < 2:
        raise Drop(f"fewer than 2 members in `{name}`")
    return [_text(member, name, where) for member in members]


def _messages(turns: list[Any], name: str, where: str) -> list[dict[str, str]]:
    """Turns as `role` and `content`; `from` and `value` are other names of the same."""
    made = []
    for number, turn in enumerate(turns):
        here = f"{name}[{number}]"
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if not isinstance(role, str):
            raise UserError(f"{where}: `{here}` has no role; a turn has `role` and `content`, or `from` and `value`")
        made.append(
            {"role": ROLES.get(role, role), "content": _text(turn.get("content", turn.get("value")), here, where)}
        )
    if not made:
        raise Drop(f"no turns in `{name}`")
    if made[-1]["role"] != "assistant":
        raise Drop(f"`{name}` ends without an answer")
    return made
