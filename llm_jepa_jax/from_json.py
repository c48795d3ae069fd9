# SPDX-License-Identifier: Apache-2.0
"""A preset file that loads a run's `config.json`: what `--config=….json` turns into."""

import ml_collections

from llm_jepa_jax.config import load_json


def get_config(path: str) -> ml_collections.ConfigDict:
    """The saved configuration at `path`."""
    return load_json(path)
