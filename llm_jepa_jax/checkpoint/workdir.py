# SPDX-License-Identifier: Apache-2.0
"""A run's directory where it is trained: checkpoints where they stay, everything else as files of this machine.

Objects of a store are written whole: they cannot be appended to, nor drawn into, nor traced into. So where the
directory lies in one, its small files are worked on in a copy here and are uploaded as objects; checkpoints go there
directly, from every process.
"""

import contextlib
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

import jax
from etils import epath

from llm_jepa_jax.checkpoint.places import Place, is_url, pauses, reason, run_place
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.checkpoint_files import PART

LOG = logging.getLogger("llm_jepa_jax")
STAYING = ("checkpoints", "invalid_checkpoints", "profile", "tensorboard", "plots")
"""What nobody reads from the copy: checkpoints are in the store alone, the others are made anew."""
WRITTEN = (".", "checkpoints", "eval", "tokenizer")
"""Where small files are written."""
STALE_SECONDS = 600.0
"""No small file takes so long to be written."""
OF_EACH_PROCESS = "profile"
"""Everything else is of process 0."""


class Workdir:
    """`place` is the run's directory, `checkpoints` lies in it, and `files` is it, or its copy on this machine."""

    def __init__(self, name: str | pathlib.PurePath):
        """Fetches the files, if they are elsewhere.

        Raises:
            UserError: runs cannot lie there, or the store cannot be reached.
        """
        self.place: Place = run_place(name)
        self._remote = is_url(name)
        self._sent: dict[str, tuple[int, int]] = {}
        """Size and time of the files that the store has."""
        self._failing = False
        self.files = pathlib.Path(self.place)
        if self._remote:
            self.files = pathlib.Path(tempfile.mkdtemp(prefix="llm_jepa_jax-")) / (self.place.name or "run")
            self.files.mkdir()
            self._fetch()

    @property
    def checkpoints(self) -> Place:
        return self.place / "checkpoints"

    def __str__(self) -> str:
        return str(self.place)

    def check_writable(self) -> None:
        """Makes the directory if it is not there.

        Raises:
            UserError: it cannot be written.
        """
        try:
            if self._remote:
                mark = self.place / f"writable-{jax.process_index()}{PART}"
                mark.write_bytes(b"")
                mark.unlink()
                return
            self.files.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # each store's library has types of its own
            words = "no such bucket" if self._remote and isinstance(error, FileNotFoundError) else reason(error)
            raise UserError(f"--workdir={self}: cannot write there: {words}; name another directory") from error
        if not os.access(self.files, os.W_OK | os.X_OK):
            raise UserError(f"--workdir={self}: cannot write there: no permission; name another directory")

    def clean(self) -> None:
        """Removes what killed processes have left half written; for process 0.

        Not what is new: another program may be evaluating the run.
        """
        for name in WRITTEN:
            for part in (self.files / name).glob(f"*{PART}"):
                with contextlib.suppress(OSError):
                    if time.time() - part.stat().st_mtime > STALE_SECONDS:
                        part.unlink()

    def upload(self) -> None:
        """Brings what has changed to the store; a warning says what cannot be brought, and the next call tries again.

        To be called before a checkpoint is saved: no checkpoint is in the store then without the metrics before it.
        """
        error = self._upload()
        if error and not self._failing:
            LOG.warning(
                "%s: FILES ARE NOT WRITTEN (%s); they are kept in %s until they can", self, reason(error), self.files
            )
        self._failing = error is not None

    def finish(self, retry_seconds: float) -> None:
        """Uploads, tried for so long, and removes the copy; nothing may be written afterwards.

        Raises:
            UserError: it could not be done; the copy stays.
        """
        for pause in pauses(retry_seconds):
            error = self._upload()
            if error is None:
                self._remove_copy()
                return
            if pause:
                LOG.warning("%s: writing files is tried again in %.0f s (%s)", self, pause, reason(error))
                time.sleep(pause)
        raise UserError(
            f"{self}: {', '.join(self._changed())} cannot be written: {reason(error)}; copy them from {self.files}"
        ) from error

    def leave(self) -> None:
        """As `finish`, where something else has failed already: once, and without an error."""
        self.upload()
        if not self._failing:
            self._remove_copy()

    def _remove_copy(self) -> None:
        if self._remote:
            shutil.rmtree(self.files.parent)

    def _fetch(self) -> None:
        for source in self._there(self.place):
            copy = self.files / source.relative_to(self.place)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
            self._sent[str(copy.relative_to(self.files))] = _state(copy)

    def _there(self, directory: epath.Path) -> Iterator[epath.Path]:
        with contextlib.suppress(FileNotFoundError):  # a run that begins
            for path in directory.iterdir():
                if path.name in STAYING or path.name.endswith(PART):
                    continue
                if path.is_dir():
                    yield from self._there(path)
                else:
                    yield path

    def _changed(self) -> list[str]:
        """Files that the store does not have as they are, by their path in the directory."""
        if not self._remote or not self.files.is_dir():
            return []
        mine = self.files if jax.process_index() == 0 else self.files / OF_EACH_PROCESS
        paths = (path for path in sorted(mine.rglob("*")) if path.is_file() and not path.name.endswith(PART))
        names = (str(path.relative_to(self.files)) for path in paths)
        return [name for name in names if self._sent.get(name) != _state(self.files / name)]

    def _upload(self) -> Exception | None:
        """What prevented it, if anything did."""
        try:
            for name in self._changed():
                state = _state(self.files / name)
                (self.place / name).write_bytes((self.files / name).read_bytes())
                self._sent[name] = state
        except Exception as error:  # as above
            return error
        return None


def _state(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def opened(name: str | pathlib.PurePath) -> Iterator[Workdir]:
    """A run's directory to write to. Where the block fails, what there is to say of it reaches the store as well."""
    workdir = Workdir(name)
    try:
        yield workdir
    except BaseException:
        workdir.leave()
        raise
