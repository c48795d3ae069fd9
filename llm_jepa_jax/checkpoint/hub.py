# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint lies: a directory, or a model of the Hugging Face hub, which is fetched once."""

import pathlib
import re

from llm_jepa_jax.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.md", "LICEN[CS]E*", "NOTICE*"]
"""What is fetched of a model."""


def is_hub_id(name: str) -> bool:
    """Whether a checkpoint's name is `ORGANISATION/MODEL` and no directory here."""
    return bool(HUB_ID.fullmatch(name)) and not pathlib.Path(name).is_dir()


def local_directory(name: str) -> pathlib.Path:
    """The directory of a checkpoint; one of the hub is fetched unless it is in the cache.

    Raises:
        UserError: it cannot be fetched, with the fix.
    """
    if not is_hub_id(name):
        return pathlib.Path(name).expanduser()
    try:
        import huggingface_hub  # optional: only models of the hub need it
    except ImportError as error:
        raise UserError(
            f"{name}: no such directory; to fetch it from the hub, `pip install huggingface_hub`"
        ) from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{name}: no such directory, and the hub did not give it ({type(error).__name__}: {reason}); where there "
            f"is a network, `huggingface-cli download {name} --local-dir DIR`, then name DIR"
        ) from error


def cached_directory(name: str) -> pathlib.Path | None:
    """The directory of a checkpoint as far as it is here: nothing is fetched. None: it is not."""
    if not is_hub_id(name):
        path = pathlib.Path(name).expanduser()
        return path if path.is_dir() else None
    try:
        import huggingface_hub  # optional, as above

        return pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None
