# SPDX-License-Identifier: Apache-2.0
"""Checkpoints through Orbax: written in the background, checked when read, and never deleted when they are damaged."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from llm_jepa_jax.checkpoint.places import Place, absolute
from llm_jepa_jax.checkpoint.vocabulary import VOCABULARY_AXIS
from llm_jepa_jax.config import CheckpointConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.parallel.processes import wait_for_all

LOG = logging.getLogger("llm_jepa_jax")
# Orbax warns at every save without a score; saving between evaluations is what we want.
logging.getLogger("absl").addFilter(lambda record: "did not provide metrics" not in record.getMessage())
NO_SPACE_WORDS = ("No space left", "RESOURCE_EXHAUSTED", "File too large", "Disk quota exceeded")


class Checkpoints:
    """The checkpoints of one run: `DIRECTORY/STEP/{state,meta}`.

    The newest `keep_last` stay, and the `keep_best` best by quality.
    """

    def __init__(self, directory: pathlib.Path, config: CheckpointConfig):
        self.directory = directory.absolute()
        self._invalid = self.directory.parent / "invalid_checkpoints"
        self._config = config
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policies: list[Any] = [checkpoint_managers.LatestN(self._config.keep_last)]
        if self._config.keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    n=self._config.keep_best,
                    get_metric_fn=lambda metrics: metrics["quality"],
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=lambda metrics: metrics["quality"],
            best_mode="max",
            enable_async_checkpointing=True,
            create=True,
        )
        return ocp.CheckpointManager(self.directory, options=options, item_names=("state", "meta"))

    def steps(self) -> list[int]:
        """Steps on disk or being written, oldest first; damaged ones included."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: dict[str, Any], quality: float | None) -> None:
        """Starts writing `state` (a tree of arrays) and `meta` (JSON); returns when the arrays are copied.

        `quality` is what checkpoints are compared by, higher is better; without it, one is never among the best.

        Raises:
            UserError: this or the save before it could not be written; earlier checkpoints stay.
        """
        metrics = None if quality is None else {"quality": quality}
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.save(step, args=arguments, metrics=metrics)
        except Exception as error:  # Orbax and TensorStore raise many types for one full disk
            raise self._write_error(error) from error

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            UserError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as above
            raise self._write_error(error) from error

    def close(self) -> None:
        """Waits and releases the manager."""
        self.wait()
        self._manager.close()

    def _write_error(self, error: Exception) -> Exception:
        text = " ".join(str(error).split())
        if isinstance(error, OSError) or any(words in text for words in NO_SPACE_WORDS):
            reason = getattr(error, "strerror", None) or next((w for w in NO_SPACE_WORDS if w in text), text[:200])
            return UserError(f"{self.directory}: cannot write a checkpoint: {reason}; make room and start again")
        return error

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, meta) of the newest checkpoint that can be read whole, on the shardings of `abstract_state`.

        One that cannot (torn, emptied, truncated) is moved to `invalid_checkpoints/` beside the directory, with a
        warning. None when there is no valid one.
        """
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, abstract_state)
            except Exception as error:  # any failure to read means: not valid
                self._set_aside(step, error)
                continue
            return step, restored["state"], restored["meta"]
        return None

    def _restore(self, step: int, abstract_state: Any) -> Any:
        restore = ocp.args.PyTreeRestore(abstract_state, restore_args=_restore_args(abstract_state))
        return self._manager.restore(step, args=ocp.args.Composite(state=restore, meta=ocp.args.JsonRestore()))

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        LOG.warning("CHECKPOINT %s IS DAMAGED AND SKIPPED (%s)", self.directory / str(step), reason)
        if jax.process_index() == 0:
            self._invalid.mkdir(exist_ok=True)
            number = sum(1 for path in self._invalid.iterdir() if path.name.startswith(f"{step}-"))
            (self.directory / str(step)).rename(self._invalid / f"{step}-{number}")
        wait_for_all("set aside")
        self._manager.close()
        self._manager = self._open()


def _restore_args(abstract: Any) -> Any:
    """Shapes must be those stored, but for the vocabulary's padding, which another mesh may want otherwise."""

    def args(path: Any, leaf: ocp.ArrayRestoreArgs) -> ocp.ArrayRestoreArgs:
        if getattr(path[-1], "key", None) in VOCABULARY_AXIS:
            return dataclasses.replace(leaf, strict=False)
        return leaf

    return jax.tree_util.tree_map_with_path(args, ocp.checkpoint_utils.construct_restore_args(abstract))


def restore_params(directory: Place, abstract_params: Any, step: int | None = None) -> tuple[int, Any]:
    """Parameters alone of a run's checkpoint (the newest readable by default), on the shardings of `abstract_params`.

    Returns the step and the parameters. Nothing in the directory is changed.

    Raises:
        UserError: there is no such checkpoint, or none can be read.
    """
    found = (
        sorted((int(p.name) for p in directory.glob("*") if p.name.isdigit()), reverse=True)
        if directory.is_dir()
        else []
    )
    wanted = found if step is None else [s for s in found if s == step]
    if not wanted:
        raise UserError(f"{directory}: no checkpoint{'' if step is None else f' of step {step}'}; train the run first")
    item = {"params": abstract_params}
    arguments = ocp.args.PyTreeRestore(item, restore_args=_restore_args(item), partial_restore=True)
    for number in wanted:
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(absolute(directory) / str(number) / "state", args=arguments)
            return number, restored["params"]
        except Exception as error:  # any failure to read means: not valid
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            LOG.warning("CHECKPOINT %s IS DAMAGED AND SKIPPED (%s)", directory / str(number), reason)
    raise UserError(
        f"{directory}: none of the checkpoints {wanted} can be read; restore one from a copy or train again"
    )
