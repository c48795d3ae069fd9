# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints lie: directories here, models of the Hugging Face hub, and directories of object stores by URL.

Paths of object stores are those of `etils.epath`, which behave like those of `pathlib`; bytes come from `fsspec`.
"""

import functools
import pathlib
import tempfile
from typing import Any

import numpy as np
from etils import epath

from llm_jepa_jax.checkpoint.hub import local_directory
from llm_jepa_jax.errors import UserError

STORES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
"""The library that each kind of URL needs."""
SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "tokenizer/*")
"""What a checkpoint has besides its weights, in its directory or a run's."""
RUN_STORES = ("gs",)
"""Where a run's checkpoints can lie: what TensorStore writes arrays to, and Orbax knows how to commit in."""
Place = pathlib.Path | epath.Path


def is_url(name: str | pathlib.PurePath) -> bool:
    """Whether a directory lies in an object store."""
    return "://" in str(name)


def place(name: str) -> Place:
    """The directory of a checkpoint; one of the hub is fetched unless it is in the cache.

    Raises:
        UserError: it cannot be reached, with the fix.
    """
    if not is_url(name):
        return local_directory(name)
    if not _is_there(name):
        raise UserError(f"{name}: no such directory")
    return epath.Path(name)


def absolute(directory: Place) -> Place:
    """The same directory, whatever the working directory will be."""
    return directory if is_url(directory) else directory.absolute()


def new_place(name: str | pathlib.PurePath) -> Place:
    """A directory that is to be written, which need not be there.

    Raises:
        UserError: its store cannot be reached, with the fix.
    """
    if not is_url(name):
        return pathlib.Path(name).expanduser()
    _is_there(str(name))
    return epath.Path(name)


def run_place(name: str | pathlib.PurePath) -> Place:
    """The directory of a run, which need not be there.

    Raises:
        UserError: runs cannot lie there, or the store cannot be reached.
    """
    scheme = str(name).partition("://")[0]
    if is_url(name) and scheme in STORES and scheme not in RUN_STORES:
        raise UserError(
            f"{name}: a run's directory lies here or in gs://, not in {scheme}://; name such a one, or one where the "
            "bucket is mounted"
        )
    return new_place(name)


def move(source: Place, target: Place) -> None:
    """Moves a directory. A store copies its objects and then removes them, so a kill between leaves both."""
    if is_url(source):
        store, inside = _store(str(source))
        store.mv(inside, _store(str(target))[1], recursive=True)
    else:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)


def _is_there(name: str) -> bool:
    scheme = name.partition("://")[0]
    if scheme not in STORES:
        known = ", ".join(f"{store}://" for store in STORES)
        raise UserError(f"{name}: {scheme}:// is not known; use {known}, or a directory here")
    if scheme in RUN_STORES:
        import fsspec.config  # only URLs need it

        # TensorStore and other processes write there too, which a listing that is kept would not show.
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    try:
        return epath.Path(name).is_dir()
    except ImportError as error:
        raise UserError(
            f"{name}: {scheme}:// needs {STORES[scheme]}, which is not installed; `pip install {STORES[scheme]}`"
        ) from error
    except Exception as error:  # each store's library has types of its own for no network, no login, no right
        raise UserError(f"{name}: cannot be reached ({type(error).__name__}: {reason(error)})") from error


def pauses(seconds: float) -> list[float]:
    """1, 2, 4, … seconds between attempts, `seconds` of them in all; 0 after the last one."""
    between = [min(2.0**n, seconds - (2.0**n - 1)) for n in range(32) if 2.0**n - 1 < seconds]
    return [*between, 0.0]


def reason(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:160]


def read_range(path: pathlib.PurePath, start: int, count: int) -> np.ndarray:
    """`count` bytes of a file from `start` on, uint8 [count]; nothing else of it is read.

    Raises:
        UserError: they cannot be read, or the file ends before.
    """
    try:
        if is_url(path):
            store, inside = _store(str(path))
            data = np.frombuffer(store.cat_file(inside, start=start, end=start + count), np.uint8)
        else:
            data = np.fromfile(path, np.uint8, count, offset=start)
    except Exception as error:  # as above
        raise UserError(f"{path}: cannot be read: {reason(error)}; download it again") from error
    if len(data) != count:
        raise UserError(f"{path}: is cut short: {count} bytes wanted at {start}, {len(data)} there; download it again")
    return data


def file_size(path: Place) -> int:
    """Bytes of a file.

    Raises:
        UserError: it cannot be found.
    """
    try:
        stat = path.stat()
    except Exception as error:  # as above
        raise UserError(f"{path}: cannot be read: {reason(error)}; download it again") from error
    return stat.length if isinstance(path, epath.Path) else stat.st_size


def _store(url: str) -> tuple[Any, str]:
    import fsspec.core  # only URLs need it

    return fsspec.core.url_to_fs(url)


def on_this_machine(directory: Place) -> pathlib.Path:
    """A directory here with the small files of a checkpoint: itself, or a copy that lasts as long as the program.

    Raises:
        UserError: the files cannot be read.
    """
    return _copy(str(directory)) if is_url(directory) else pathlib.Path(directory)


@functools.cache
def _copy(url: str) -> pathlib.Path:
    source, target = epath.Path(url), _temporary()
    try:
        for pattern in SMALL_FILES:
            for file in source.glob(pattern):
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                copy.write_bytes(file.read_bytes())
    except Exception as error:  # as above
        raise UserError(f"{url}: cannot be read ({type(error).__name__}: {reason(error)})") from error
    return target


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
"""Directories that go when the program ends."""


def _temporary() -> pathlib.Path:
    _KEPT.append(tempfile.TemporaryDirectory(prefix="llm_jepa_jax-"))
    return pathlib.Path(_KEPT[-1].name)
