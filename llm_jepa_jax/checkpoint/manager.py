# SPDX-License-Identifier: Apache-2.0
"""Checkpoints through Orbax: written in the background, checked when read, and never deleted when they are damaged.

A disk that fails or is full does not end a run: it goes on with the last good checkpoint and tries again.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from llm_jepa_jax.checkpoint.checksums import as_saved, as_wanted, check, describe, opened, sealed
from llm_jepa_jax.checkpoint.places import Place, absolute, is_url, move, pauses, reason
from llm_jepa_jax.config import CheckpointConfig
from llm_jepa_jax.errors import TryAgainError, UserError
from llm_jepa_jax.parallel.processes import any_process, wait_for_all
from llm_jepa_jax.text.checkpoint_files import write_whole

LOG = logging.getLogger("llm_jepa_jax")
NO_SPACE_WORDS = ("No space left", "RESOURCE_EXHAUSTED", "File too large", "Disk quota exceeded")
READ_PAUSES = (1.0, 4.0)
"""Seconds before a read that the file system refused is tried again."""


class Checkpoints:
    """The checkpoints of one run: `DIRECTORY/STEP/{state,meta}`.

    The newest `keep_last` stay, and the `keep_best` best by quality (`DIRECTORY/quality.json`).
    """

    def __init__(self, directory: Place, config: CheckpointConfig):
        self.directory = epath.Path(absolute(directory))
        self._invalid = self.directory.parent / "invalid_checkpoints"
        self._config = config
        self._quality = _Quality(self.directory / "quality.json", config.keep_best)
        self.writing: int | None = None
        """The step that is being written: the newest that a kill leaves is the one before it."""
        self._error: Exception | None = None
        """Why the last save failed, if it did."""
        self._manager: ocp.CheckpointManager | None = self._open()

    def _open(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:
            for torn in _torn(self.directory):  # of a killed run or a full disk
                with contextlib.suppress(Exception):
                    torn.rmtree()
        wait_for_all("open checkpoints")
        policies: list[Any] = [checkpoint_managers.LatestN(self._config.keep_last), self._quality]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            # Else a directory that cannot be made leaves threads that wait for it, and hold up the program's end.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            create=True,
        )
        return ocp.CheckpointManager(self.directory, options=options, item_names=("state", "meta"))

    def steps(self) -> list[int]:
        """Steps on disk or being written, oldest first; damaged ones included."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def rate(self, step: int, quality: float | None) -> None:
        """Says what a checkpoint is compared by, higher is better; without it, one is never among the best."""
        if quality is not None:
            self._quality.add(step, quality, self.steps())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts writing `state` (a tree of arrays) and `meta` (JSON); returns when the arrays are copied.

        If that fails, now or later, the earlier checkpoints stay, and a warning says what failed.
        """
        self.settle()
        values = sealed(meta | {"arrays": describe(state)})
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(values))
        self.writing = step
        self._try(lambda manager: manager.save(step, args=arguments))

    def finish(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves the last step, unless it is there, and waits for it; tried for `checkpoint.retry_seconds`.

        Raises:
            UserError: it could not be written.
        """
        self.settle()
        for pause in pauses(self._config.retry_seconds):
            if step in self.steps():
                return
            self.save(step, state, meta)
            self.settle()
            if self._error and pause:
                LOG.warning("step %d: saving is tried again in %.0f s", step, pause)
                time.sleep(pause)
        if self._error:
            words = f"cannot write a checkpoint: {_reason(self._error)}; make room and start again"
            raise UserError(f"{self.directory}: {words}") from self._error

    def close(self) -> None:
        """Waits for what is being written and releases the manager."""
        self.settle()
        if self._manager:
            self._manager.close()

    def settle(self) -> None:
        """Waits until everything is on disk, or is known to have failed."""
        step = self.writing
        if step is not None:
            self._try(lambda manager: self._written(manager, step))
            self.writing = None

    def _written(self, manager: ocp.CheckpointManager, step: int) -> None:
        manager.wait_until_finished()
        if jax.process_index() == 0 and not ocp.utils.is_checkpoint_finalized(self.directory / str(step)):
            raise OSError(f"{self.directory / str(step)} is not there")

    def _try(self, write: Callable[[ocp.CheckpointManager], None]) -> None:
        """Takes a part of saving. If it fails on any process, all forget the save and open the directory anew."""
        error: Exception | None = None
        try:
            self._manager = self._manager or self._open()
            write(self._manager)
        except Exception as caught:  # Orbax and TensorStore raise many types for one full disk
            error = caught
        if not any_process(error is not None):
            self._error = None
            return
        self._error = error or OSError("another process could not write its part")
        step, self.writing = self.writing, None
        with contextlib.suppress(Exception):
            if self._manager:
                self._manager.close()
        self._manager = None  # its list of steps has the failed one
        with contextlib.suppress(Exception):
            self._manager = self._open()
        LOG.warning(
            "CHECKPOINT %s IS NOT WRITTEN (%s); the last good one is %s; saving is tried again at the next save",
            self.directory / str(step), _reason(self._error), max(self.steps(), default="none"),
        )  # fmt: skip

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, meta) of the newest checkpoint that can be read whole, on the shardings of `abstract_state`.

        One that cannot (torn, emptied, truncated, or with a wrong checksum) is moved to `invalid_checkpoints/` beside
        the directory, with a warning. None when there is no valid one.

        Raises:
            TryAgainError: the store does not answer.
        """
        self.settle()
        for step in reversed(self.steps()):
            restored, error = _read(self.directory / str(step), abstract_state, self._config.verify)
            if not any_process(error is not None):
                return step, *restored
            self._set_aside(step, error or OSError("another process cannot read its part"))
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        LOG.warning("CHECKPOINT %s IS DAMAGED AND SKIPPED (%s)", self.directory / str(step), _words(error))
        if jax.process_index() == 0:
            number = len(list(self._invalid.glob(f"{step}-*")))
            move(self.directory / str(step), self._invalid / f"{step}-{number}")
        wait_for_all("set aside")
        if self._manager:
            self._manager.close()
        self._manager = self._open()


class _Quality:
    """Keeps the best checkpoints, as an Orbax preservation policy; a quality may be told after the save."""

    def __init__(self, path: epath.Path, count: int):
        self._path, self._count = path, count
        self._known: dict[int, float] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):  # torn by a kill: none of them is best then
            self._known = {int(step): float(value) for step, value in json.loads(path.read_text()).items()}

    def add(self, step: int, quality: float, steps: Sequence[int]) -> None:
        """Remembers the quality of a step; those that are not on disk any more are forgotten."""
        self._known = {step: value for step, value in self._known.items() if step in steps} | {step: quality}
        if jax.process_index() == 0:
            try:
                write_whole(self._path, (json.dumps(self._known) + "\n").encode())
            except Exception as error:  # each store's library has types of its own
                LOG.warning("%s: not written (%s); after a restart no one knows which is best", self._path, error)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Orbax's question: which of these stay."""
        rated = [info.step for info in checkpoints if info.step in self._known]
        best = sorted(rated, key=lambda step: (self._known[step], step))[-self._count :] if self._count else []
        return [info.step in best for info in checkpoints]


def saved_steps(directory: Place) -> list[int]:
    """Steps of which there is a whole checkpoint, oldest first; it may be damaged all the same."""
    if not directory.is_dir():
        return []
    found = [path for path in epath.Path(absolute(directory)).iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in found if ocp.utils.is_checkpoint_finalized(path))


def _torn(directory: epath.Path) -> list[epath.Path]:
    """Checkpoints that nobody finished. In a store they have their final name, but no mark that they are whole."""
    paths = list(directory.iterdir()) if directory.is_dir() else []
    unfinished = [path for path in paths if "orbax-checkpoint-tmp" in path.name]
    if is_url(directory):
        unfinished += [p for p in paths if p.name.isdigit() and not ocp.utils.is_checkpoint_finalized(p)]
    return unfinished


def _reason(error: Exception) -> str:
    """Why a write failed: what the system says, where it can be found in what Orbax and TensorStore raise."""
    found = next((words for words in NO_SPACE_WORDS if words in str(error)), None)
    return getattr(error, "strerror", None) or found or _words(error)


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _read(directory: Place, abstract: Any, verify: bool, whole: bool = True) -> tuple[Any, Exception | None]:
    """((arrays, meta), None) of one checkpoint, or (None, why not). Refusals of the file system are tried again.

    The file system may fail for a moment; what can be read but is wrong will not get better.
    """
    for pause in (*READ_PAUSES, None):
        try:
            return _read_once(directory, abstract, verify, whole), None
        except OSError as error:
            if pause is None or isinstance(error, FileNotFoundError | NotADirectoryError):
                return None, _of_checkpoint(directory, error)
            LOG.warning("%s: cannot be read (%s); tried again in %.0f s", directory, _words(error), pause)
            time.sleep(pause)
        except Exception as error:  # any failure to read means: not valid
            return None, _of_checkpoint(directory, error)
    raise AssertionError("the last pause is None")


def _of_checkpoint(directory: Place, error: Exception) -> Exception:
    """The error, where the checkpoint is to blame for it, and not a store that does not answer.

    Raises:
        TryAgainError: the store cannot be read now; no checkpoint is damaged for that.
    """
    if is_url(directory):
        try:
            (directory / "commit_success.txt").read_bytes()
        except FileNotFoundError:
            pass
        except Exception as silent:  # each store's library has types of its own
            raise TryAgainError(f"{directory}: cannot be read now: {reason(silent)}; start again") from error
    return error


def _read_once(directory: Place, abstract: Any, verify: bool, whole: bool) -> tuple[Any, dict[str, Any]]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        meta = opened(reader.restore(directory / "meta"))
    arrays = meta.pop("arrays")
    stored = as_saved(abstract, arrays)
    arguments = ocp.args.PyTreeRestore(
        stored, restore_args=ocp.checkpoint_utils.construct_restore_args(stored), partial_restore=not whole
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(directory / "state", args=arguments)
    if verify:
        check(restored, arrays)
    return as_wanted(restored, abstract), meta


def restore_params(directory: Place, abstract_params: Any, step: int | None = None) -> tuple[int, Any]:
    """Parameters alone of a run's checkpoint (the newest readable by default), on the shardings of `abstract_params`.

    Returns the step and the parameters. Nothing in the directory is changed.

    Raises:
        UserError: there is no such checkpoint, or none can be read.
    """
    found = saved_steps(directory)[::-1]
    wanted = found if step is None else [s for s in found if s == step]
    if not wanted:
        raise UserError(f"{directory}: no checkpoint{'' if step is None else f' of step {step}'}; train the run first")
    for number in wanted:
        restored, error = _read(absolute(directory) / str(number), {"params": abstract_params}, True, whole=False)
        if restored is not None:
            return number, restored[0]["params"]
        LOG.warning("CHECKPOINT %s IS DAMAGED AND SKIPPED (%s)", directory / str(number), _words(error))
    raise UserError(
        f"{directory}: none of the checkpoints {wanted} can be read; restore one from a copy or train again"
    )
