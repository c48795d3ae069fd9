# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: parts of tensors read without the rest, and tensors written one at a time.

A file is an 8-byte length, a JSON header of that length (name → type, shape, offsets), and the tensors' bytes, little
endian and row by row, one behind the other.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.checkpoint.places import Place, file_size, read_range
from llm_jepa_jax.errors import UserError

TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
"""The types of weights, by their names in files."""
SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of an element of other types, which are known but not read."""
LARGEST_HEADER = 100_000_000
ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Place
    type_name: str
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""

    @property
    def dtype(self) -> np.dtype:
        """The type of its elements."""
        return TYPES[self.type_name]

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of it, of which whole rows are read, and no others.

        Raises:
            UserError: the file cannot be read, or ends too early.
        """
        first, stop, _ = (index or (slice(None),))[0].indices(self.shape[0])
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = read_range(self.path, self.start + first * width, (stop - first) * width)
        return data.view(self.dtype).reshape(stop - first, *self.shape[1:])[(slice(None), *index[1:])]

    def sample(self, most: int) -> bytes:
        """Up to so many bytes from its middle."""
        size = math.prod(self.shape) * self.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.start + max(0, size - most) // 2)
            return file.read(min(most, size))


def read_header(path: Place) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        UserError: the file is missing, cut short, or no safetensors file.
    """
    try:
        size = file_size(path)
        length = int.from_bytes(read_range(path, 0, 8).tobytes(), "little") if size >= 8 else 0
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise UserError(f"{path}: is cut short or no safetensors file ({size} bytes); download it again")
        values = json.loads(read_range(path, 8, length).tobytes())
    except ValueError as error:
        raise UserError(f"{path}: has no readable header; it is damaged: download it again") from error
    try:
        values.pop("__metadata__", None)
        spans = {name: (v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for name, v in values.items()}
        _check_spans(path, spans, size - 8 - length)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: has a header that is none of safetensors; it is damaged: download it again"
        ) from error
    return {
        name: StoredTensor(path, kind, shape, 8 + length + start) for name, (kind, shape, start, _) in spans.items()
    }


def _check_spans(path: pathlib.Path, spans: dict[str, tuple[Any, ...]], size: int) -> None:
    """Tensors fill the bytes behind the header, one behind the other, each as many as its shape needs."""
    place = 0
    for name, (kind, shape, start, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        width = TYPES[kind].itemsize if kind in TYPES else SIZES.get(kind, 0)
        if start != place or (width and end - start != width * math.prod(shape)):
            raise UserError(f"{path}: the bytes of `{name}` are not where its shape wants them; it is damaged")
        place = end
    if place != size:
        raise UserError(f"{path}: holds {size} bytes of tensors, not {place}; it is cut short: download it again")


class Writer:
    """Writes one file: shapes first, then the tensors in that order."""

    def __init__(self, path: Place, shapes: dict[str, tuple[int, ...]], dtype: np.dtype):
        self.path, self._dtype, self._waiting = path, dtype, list(shapes.items())
        self._file = self._open(shapes)

    def _open(self, shapes: dict[str, tuple[int, ...]]) -> BinaryIO:
        kind = next(name for name, dtype in TYPES.items() if dtype == self._dtype)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for name, shape in shapes.items():
            end = place + math.prod(shape) * self._dtype.itemsize
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, end]}
            place = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        file = self.path.open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        return file

    def add(self, name: str, array: np.ndarray) -> None:
        """Writes the next tensor.

        Raises:
            ValueError: it is not the one whose turn it is.
        """
        if self._waiting.pop(0) != (name, array.shape):
            raise ValueError(f"{name} {array.shape} is out of turn in {self.path}")
        # Not every type of ours knows the buffer protocol, bytes do.
        self._file.write(np.ascontiguousarray(array.astype(self._dtype)).view(np.uint8).data)

    def close(self) -> None:
        """Ends the file.

        Raises:
            ValueError: tensors are missing.
        """
        self._file.close()
        if self._waiting:
            raise ValueError(f"{self.path}: {self._waiting[0][0]} was not written")
