# SPDX-License-Identifier: Apache-2.0
"""What configuration keys are made of: declaring, checking and describing them. The keys are in `config.py`."""

import dataclasses
import json
from typing import Any

from llm_jepa_jax.errors import UserError


def key(default: Any, meaning: str, unit: str = "", choices: tuple[str, ...] = ()) -> Any:
    """Declares one configuration key. `choices` lists the only strings allowed."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "unit": unit, "choices": choices})


def section(cls: type, meaning: str) -> Any:
    """Declares a nested section."""
    return dataclasses.field(default_factory=cls, metadata={"meaning": meaning, "section": True})


def freeze_section(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """One section, and those below it, from nested mappings; keys left out take their defaults.

    `prefix` is the section's path, with a dot behind it.

    Raises:
        UserError: unknown key, wrong type, or a string that is not among the key's choices.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"config: unknown key `{prefix}{name}`; keys here are {', '.join(sorted(fields))}")
    changes = {}
    for name, value in values.items():
        field, path = fields[name], prefix + name
        if field.metadata.get("section"):
            if not isinstance(value, dict):
                raise UserError(f"config: `{path}` is a section, not {value!r}; set the keys below it")
            changes[name] = freeze_section(field.default_factory, value, path + ".")  # type: ignore[arg-type]
        else:
            changes[name] = _checked(field, path, value)
    return cls(**changes)


def _checked(field: dataclasses.Field, path: str, value: Any) -> Any:
    expected = type(field.default)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if expected is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not expected:
        raise UserError(f"config: `{path}`={value!r} has type {type(value).__name__}; it takes {expected.__name__}")
    if isinstance(value, tuple) and any(type(item) is not int for item in value):
        raise UserError(f"config: `{path}`={value!r}; it takes whole numbers, such as (2,4)")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"config: `{path}`={value!r}; use one of {', '.join(choices)}")
    return value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to `{"a.b": value}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": value}` to nested dictionaries."""
    values: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        node = values
        for section_name in sections:
            node = node.setdefault(section_name, {})
        node[name] = value
    return values


def describe_section(cls: type, prefix: str, meaning: str) -> list[str]:
    """A section's keys as Markdown lines, and those of the sections below it."""
    plain = [f for f in dataclasses.fields(cls) if not f.metadata.get("section")]
    lines = ["", f"## `{prefix.rstrip('.')}`: {meaning}" if prefix else "## Top level", ""]
    lines += ["| key | default | unit | meaning |", "|---|---|---|---|"]
    for field in plain:
        default = "()" if field.default == () else json.dumps(field.default, ensure_ascii=False)
        lines.append(
            f"| `{prefix}{field.name}` | `{default}` | {field.metadata['unit']} | {field.metadata['meaning']} |"
        )
    for field in dataclasses.fields(cls):
        if field.metadata.get("section"):
            lines += describe_section(field.default_factory, f"{prefix}{field.name}.", field.metadata["meaning"])  # type: ignore[arg-type]
    return lines
