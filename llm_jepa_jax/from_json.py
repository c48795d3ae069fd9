# SPDX-License-Identifier: Apache-2.0
"""A preset file that loads a run's `config.json`: what `--config=….json` turns into."""

import json
import pathlib

import ml_collections
from etils import epath

from llm_jepa_jax.config import freeze, to_dict
from llm_jepa_jax.errors import UserError


def get_config(path: str) -> ml_collections.ConfigDict:
    """The saved configuration at `path`."""
    return load_json(path)


def load_json(path: str | pathlib.PurePath) -> ml_collections.ConfigDict:
    """A saved configuration as `ConfigDict`, with defaults for keys it does not name.

    Raises:
        UserError: the file is missing, is not JSON, or holds an unknown key.
    """
    try:
        values = json.loads(epath.Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); pass a config.json of a run") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a JSON object, not {type(values).__name__}")
    return ml_collections.ConfigDict(to_dict(freeze(values)))
