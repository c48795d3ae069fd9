# SPDX-License-Identifier: Apache-2.0
"""The default: a few million parameters, minutes on a laptop CPU."""

import ml_collections

from llm_jepa_jax.config import base_config
from llm_jepa_jax.presets import finish


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The base configuration; `:smoke` makes it a miniature."""
    return finish(base_config(), arg)
