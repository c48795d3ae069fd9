# SPDX-License-Identifier: Apache-2.0
"""LLM-JEPA in JAX: next-token prediction plus a joint-embedding predictive loss over two views."""

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_jepa_jax.api import LanguageModel

__version__ = "0.1.0"


def load(directory: str | pathlib.Path, adapter: str | pathlib.Path | None = None) -> "LanguageModel":
    """Opens a run or a published model: see `llm_jepa_jax.api.load`. JAX is imported here, not with the package."""
    from llm_jepa_jax.api import load as load_run

    return load_run(directory, adapter)
