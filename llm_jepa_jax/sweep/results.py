# SPDX-License-Identifier: Apache-2.0
"""What points have found, read from their directories, and what is known of those that failed."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.scores import RESULT
from llm_jepa_jax.eval.task import LikelihoodTask, all_tasks
from llm_jepa_jax.sweep.points import Point
from llm_jepa_jax.text.checkpoint_files import write_whole

TRAINED, DONE, FAILED, MISSING = "trained", "done", "failed", "missing"
"""States of a point: it lacks its test evaluation; has all; ended with an error; has not ended yet."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One point as it stands."""

    point: Point
    state: str
    error: str = ""
    """Of a failed one: the last line of its log."""
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Last line of training."""
    test: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Last line of the evaluation on test records."""

    @functools.cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl; a line that is being written is left out."""
        path = self.point.workdir / "metrics.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    @functools.cached_property
    def flops(self) -> list[tuple[int, float]]:
        """(step, FLOPs from the first step to this one), by metrics line."""
        found, total, last = [(0, 0.0)], 0.0, 0
        for line in self.lines:
            if "step_flops" in line:
                total += line["step_flops"] * (line["step"] - last)
                last = line["step"]
                found.append((last, total))
        return found

    @property
    def total_flops(self) -> float | None:
        """FLOPs of all steps; those behind the last metrics line count as the ones before it. None: not recorded."""
        step, total = self.flops[-1]
        return total * self.result["step"] / step if step and self.result else None


def value(values: dict[str, Any], metric: str) -> float | None:
    """A metric that may have been written as text for not being finite."""
    found = values.get(metric)
    return None if found is None else float(found)


def metric_of(name: str, tasks: str) -> str:
    """What a sweep compares: the name given, or the first task.

    Raises:
        UserError: it is neither one of the tasks nor a loss.
    """
    known = [task.strip() for task in tasks.split(",")]
    if name and name not in known and name not in ("ntp_loss", "jepa_loss"):
        raise UserError(f"metric={name!r}: not among eval.tasks ({', '.join(known)}) and not ntp_loss or jepa_loss")
    return name or known[0]


def higher_is_better(metric: str) -> bool:
    """False of losses and perplexities; what is true of are shares, shown in percent."""
    return not metric.endswith("_loss") and not isinstance(all_tasks().get(metric), LikelihoodTask)


def read(point: Point) -> Outcome:
    """A point as its directory says."""
    result, test = _object(point.workdir / RESULT), _object(point.workdir / "test" / RESULT)
    if result and (test or not point.test):
        return Outcome(point, DONE, "", result, test)
    failure = _object(_failure(point))
    if failure:
        return Outcome(point, FAILED, failure["error"], result)
    return Outcome(point, TRAINED if result else MISSING, "", result)


def record_failure(point: Point, code: int, error: str) -> None:
    """What ended a point: shown wherever its number would be."""
    _failure(point).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"code": code, "error": error}, ensure_ascii=False) + "\n"
    write_whole(_failure(point), text.encode("utf-8", "backslashreplace"))


def forget_failure(point: Point) -> None:
    """Before it is tried again."""
    _failure(point).unlink(missing_ok=True)


def _failure(point: Point) -> pathlib.Path:
    return point.directory / "failures" / f"{point.name}.json"


def _object(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
