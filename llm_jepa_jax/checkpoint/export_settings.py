# SPDX-License-Identifier: Apache-2.0
"""How a model is exported; read before JAX starts."""

import dataclasses
from typing import Any

from llm_jepa_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5_000_000_000
PREDICTOR_ROWS = ("keep", "drop")


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """How a model is written."""

    dtype: str = ""
    """`float32`, `bfloat16` or `float16`; empty: that of the parameters."""
    shard_bytes: int = SHARD_BYTES
    """The most that a file of several tensors holds."""
    num_tokens: int = 0
    """Rows of the vocabulary to keep, from the first; 0: all."""
    token_ids: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What `config.json` says of tokens."""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """By name, written as they are."""

    def __post_init__(self) -> None:
        """Raises `UserError` where a setting is wrong."""
        if self.dtype not in ("", *DTYPES):
            raise UserError(f"dtype={self.dtype!r}; use {', '.join(DTYPES)}, or nothing for that of the parameters")
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes={self.shard_bytes}; use the most bytes of a file, such as {SHARD_BYTES}")
