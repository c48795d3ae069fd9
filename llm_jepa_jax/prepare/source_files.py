# SPDX-License-Identifier: Apache-2.0
"""Files of a distribution: one by one, in a directory, or in an archive, which is read and not unpacked."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import lzma
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeAlias

from llm_jepa_jax.errors import UserError

CHUNK = 1 << 20
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
READ_ERRORS = (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
"""What reading a damaged, cut or encrypted file raises."""
Opened: TypeAlias = contextlib.AbstractContextManager[BinaryIO]


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file to read."""

    name: str
    """Its path inside the source, with `/`."""
    origin: str
    """How messages name it."""
    container: pathlib.Path
    """The file on disk that it is, or lies in: what a checksum is of."""
    open: Callable[[], Opened]

    @property
    def basename(self) -> str:
        """Its name without directories and without `.gz`."""
        return pathlib.PurePosixPath(self.name).name.removesuffix(".gz")

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Its bytes.

        Raises:
            UserError: they cannot be read.
        """
        try:
            with self.open() as file:
                yield file
        except READ_ERRORS as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.origin}: cannot be read ({words[:160]}); fetch it again") from error

    def lines(self, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
        """(`file:line`, text) of every line, without the newline; errors as in `opened` and `decoded`."""
        with self.opened() as file:
            for number, line in enumerate(file, start=1):
                where = f"{self.origin}:{number}"
                yield where, decoded(line.rstrip(b"\r\n"), where, encoding)


def decoded(line: bytes, where: str, encoding: str = "utf-8") -> str:
    """The text of some bytes; a UserError with `where` they are of if they are no such text."""
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not {encoding.upper()} at byte {error.start}; save it as {encoding.upper()}"
        ) from error


def list_files(path: pathlib.Path) -> list[SourceFile]:
    """The files of a directory (archives in it are not entered), of an archive, or the file itself; sorted.

    Raises:
        UserError: nothing is there, an archive cannot be read, or one of its members leads outside.
    """
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return [_plain(p, p.relative_to(path).as_posix()) for p in found]
    if not path.is_file():
        raise UserError(
            f"--source={path}: no such file or directory; name a file, a directory, an archive or a https URL"
        )
    try:
        if path.name.endswith(".zip"):
            return _members_of_zip(path)
        if path.name.endswith(TAR_ENDINGS):
            return _members_of_tar(path)
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]}); fetch it again") from error
    return [_plain(path, path.name)]


def _plain(path: pathlib.Path, name: str) -> SourceFile:
    def start() -> Opened:
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]

    return SourceFile(name, str(path), path, start)


def _members_of_zip(path: pathlib.Path) -> list[SourceFile]:
    with zipfile.ZipFile(path) as archive:
        names = _checked(path, [info.filename for info in archive.infolist() if not info.is_dir()])

    @contextlib.contextmanager
    def start(name: str) -> Iterator[BinaryIO]:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            yield file  # type: ignore[misc]

    return [SourceFile(name, f"{path}:{name}", path, functools.partial(start, name)) for name in names]


def _members_of_tar(path: pathlib.Path) -> list[SourceFile]:
    with tarfile.open(path) as archive:
        names = _checked(path, [member.name for member in archive if member.isreg()])

    @contextlib.contextmanager
    def start(name: str) -> Iterator[BinaryIO]:
        with tarfile.open(path) as archive:
            file = archive.extractfile(name)
            assert file is not None  # a regular file
            with file:
                yield file  # type: ignore[misc]

    return [SourceFile(name, f"{path}:{name}", path, functools.partial(start, name)) for name in names]


def _checked(path: pathlib.Path, names: Sequence[str]) -> list[str]:
    """The members' names without those that an operating system adds."""
    for name in names:
        parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or name.startswith(("/", "\\")) or ":" in (parts or ("",))[0]:
            raise UserError(f"{path}: its member {name!r} leads outside the archive; do not trust it, fetch it anew")
    return sorted(
        n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/") if part != ".")
    )


def sha256_of(path: pathlib.Path) -> str:
    """sha256 hex of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
