# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint that a tokenizer is made of, as bytes, and what they say."""

import dataclasses
import hashlib
import json
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

from llm_jepa_jax.errors import UserError

CHECKPOINT_DIRECTORY = "tokenizer"
"""Its name in a run's directory."""
TOKENIZER, MODEL, TEMPLATE, RECORD = "tokenizer.json", "tokenizer.model", "chat_template.jinja", "predictor_tokens.json"
CONFIG, MAP, GENERATION, MODEL_CONFIG = (
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json",
)  # fmt: skip
NAMES = (TOKENIZER, MODEL, CONFIG, MAP, "added_tokens.json", TEMPLATE, GENERATION, MODEL_CONFIG, RECORD)


PART = ".part"
"""How the names of files end that are being written; a killed process leaves one behind."""


def write_whole(path: Any, data: bytes) -> None:
    """Writes a file whole or not at all; `path` is one of `pathlib` or, in an object store, of `epath`."""
    if "://" in str(path):
        path.write_bytes(data)  # an object is there when all of it is
        return
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")  # another process may write the same file
    part.write_bytes(data)
    part.replace(path)


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
    """Those of `NAMES` that a directory has."""

    origin: str
    contents: dict[str, bytes]

    def json(self, name: str) -> dict[str, Any]:
        """A file's JSON object; empty where there is no such file.

        Raises:
            UserError: it is not JSON, or no object.
        """
        if name not in self.contents:
            return {}
        try:
            value = json.loads(self.contents[name])
        except ValueError as error:
            raise UserError(f"{self.origin}/{name}: not JSON ({error}); copy it anew from the checkpoint") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.origin}/{name}: a JSON object belongs here, not {type(value).__name__}")
        return value

    def text(self, name: str) -> str:
        """A file's text.

        Raises:
            UserError: it is not UTF-8.
        """
        try:
            return self.contents[name].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.origin}/{name}: not UTF-8 ({error.reason}); copy it anew") from error

    @property
    def fingerprint(self) -> str:
        """sha256 over names and bytes, all but the record of what was chosen here."""
        parts = (
            part for name in sorted(self.contents) if name != RECORD for part in (name.encode(), self.contents[name])
        )
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def special_tokens(self) -> dict[str, str]:
        """The named special tokens, such as `bos_token`: what a chat template sees. `tokenizer_config.json` wins."""
        config = self.json(CONFIG)
        found = {name: _spelling(value) for name, value in _named(self.json(MAP)) if name not in config}
        found |= {name: _spelling(value) for name, value in _named(config)}
        return {name: value for name, value in found.items() if value}

    def ids(self, name: str) -> list[int]:
        """Ids that `generation_config.json`, or else `config.json`, gives for a key such as `eos_token_id`."""
        for file in (GENERATION, MODEL_CONFIG):
            value = self.json(file).get(name)
            if value is not None:
                ids = value if isinstance(value, list) else [value]
                if not all(isinstance(index, int) for index in ids):
                    raise UserError(f"{self.origin}/{file}: `{name}`={value!r}; it must be an id or a list of ids")
                return ids
        return []

    def chat_template(self) -> str:
        """The Jinja source: `chat_template.jinja`, or else `chat_template` of `tokenizer_config.json`; may be empty.

        Raises:
            UserError: there are several templates and none is called `default`.
        """
        if TEMPLATE in self.contents:
            return self.text(TEMPLATE)
        found = self.json(CONFIG).get("chat_template") or ""
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            if "default" not in named:
                raise UserError(
                    f"{self.origin}/{CONFIG}: `chat_template` has {', '.join(map(str, named))} and no `default`; "
                    "name a Jinja file with text.chat_template"
                )
            found = named["default"]
        if not isinstance(found, str):
            raise UserError(f"{self.origin}/{CONFIG}: `chat_template` is {type(found).__name__}; it must be a string")
        return found

    def save(self, directory: pathlib.Path) -> None:
        """Copies every file byte for byte."""
        directory.mkdir(exist_ok=True)
        for name, data in self.contents.items():
            write_whole(directory / name, data)


def _named(source: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries that name one special token."""
    return ((name, value) for name, value in source.items() if name.endswith("_token") and _spelling(value))


def _spelling(value: Any) -> str:
    """A token's text, which stands alone or in a dictionary; empty where there is none."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def read_checkpoint_files(place: pathlib.Path) -> CheckpointFiles:
    """Reads a checkpoint's directory, or a `tokenizer.json` (of any name) with the files beside it.

    Raises:
        UserError: there is no tokenizer there.
    """
    directory = place if place.is_dir() else place.parent
    paths = {name: directory / name for name in NAMES}
    if not place.is_dir():
        paths[TOKENIZER] = place
    try:
        contents = {name: path.read_bytes() for name, path in paths.items() if path.is_file() or path == place}
    except OSError as error:
        raise UserError(f"text.tokenizer={place}: {error.strerror}; name a checkpoint's directory") from error
    if TOKENIZER not in contents and MODEL not in contents:
        raise UserError(
            f"text.tokenizer={place}: no {TOKENIZER} and no {MODEL} there; name the directory of a checkpoint"
        )
    return CheckpointFiles(str(directory), contents)


def configured_ids(directory: pathlib.Path, name: str) -> list[int]:
    """Ids of a key such as `eos_token_id` in a directory's `generation_config.json`, or else `config.json`."""
    paths = [directory / file for file in (GENERATION, MODEL_CONFIG)]
    return CheckpointFiles(str(directory), {p.name: p.read_bytes() for p in paths if p.is_file()}).ids(name)
