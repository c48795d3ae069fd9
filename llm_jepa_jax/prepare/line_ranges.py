# SPDX-License-Identifier: Apache-2.0
"""Large text files cut into ranges of whole lines, in one pass that holds a piece at a time."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence

from llm_jepa_jax.data.sources import GZIP_MAGIC, UTF8_MARK
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.source_files import decoded

CHUNK = 1 << 23


@dataclasses.dataclass(frozen=True)
class Span:
    """Lines of one file that follow each other."""

    file: int
    """Number of the file among the inputs."""
    path: pathlib.Path
    start: int
    """First byte."""
    stop: int
    line: int
    """Number of the first line, from 1."""

    def lines(self) -> Iterator[tuple[int, str, str]]:
        """(number, `file:line`, text) of every line that is not blank.

        Raises:
            UserError: a line is not UTF-8.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            left, number = self.stop - self.start, self.line
            while left > 0:
                line = file.readline()
                if not line:
                    raise UserError(f"{self.path}: became shorter while it was read; leave it alone and start again")
                left -= len(line)
                if number == 1:
                    line = line.removeprefix(UTF8_MARK)
                if line.strip():
                    where = f"{self.path}:{number}"
                    yield number, where, decoded(line.rstrip(b"\n"), where)
                number += 1


@dataclasses.dataclass(frozen=True)
class Input:
    """A file to be cut, as the pass over it found it."""

    path: pathlib.Path
    size: int
    sha256: str


def cut(paths: Sequence[pathlib.Path], count: int) -> tuple[list[Input], list[list[Span]]]:
    """The files, and at most `count` parts of them of about equal size, each of whole lines.

    Fewer where lines are so long that a part would have none. The parts in order are the files in order.

    Raises:
        UserError: a file is missing, empty or compressed.
    """
    sizes = [_size(path) for path in paths]
    total, before = sum(sizes), 0
    inputs: list[Input] = []
    parts: list[list[Span]] = [[]]
    targets = [total * number // count for number in range(1, count)]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        wanted = [target - before for target in targets if before < target <= before + size]
        digest, places = _scan(path, wanted)
        inputs.append(Input(path, size, digest))
        start, line = 0, 1
        for place, place_line in [*places, (size, 0)]:
            if place > start:
                parts[-1].append(Span(number, path, start, place, line))
            if place_line and parts[-1]:
                parts.append([])
            start, line = place, place_line
        before += size
    return inputs, [part for part in parts if part]


def _size(path: pathlib.Path) -> int:
    if path.is_dir():
        raise UserError(f"--source={path}: is a directory; --shards reads JSONL files, name them with commas between")
    try:
        with path.open("rb") as file:
            head = file.read(2)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"--source={path}: {error.strerror}; name JSONL files with commas between") from error
    if head == GZIP_MAGIC:
        raise UserError(f"{path}: gzip cannot be cut; run `gunzip {path}` and name the result")
    if not size:
        raise UserError(f"{path}: the file is empty; each line holds one JSON object")
    return size


def _scan(path: pathlib.Path, wanted: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """sha256 of a file, and for each wanted place (rising) the beginning of the first line from there on and its
    number; places in one line are one."""
    digest, places = hashlib.sha256(), []
    position, line, waiting = 0, 1, list(wanted)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            counted = 0
            while waiting and waiting[0] <= position + len(chunk):
                found = chunk.find(b"\n", max(0, waiting[0] - 1 - position))
                if found < 0:
                    break  # the line goes on in the next piece
                line += chunk.count(b"\n", counted, found + 1)
                counted = found + 1
                places.append((position + found + 1, line))
                while waiting and waiting[0] <= position + found + 1:
                    waiting.pop(0)
            line += chunk.count(b"\n", counted)
            position += len(chunk)
    if waiting:  # a last line without an end
        places.append((position, line))
    return digest.hexdigest(), places
