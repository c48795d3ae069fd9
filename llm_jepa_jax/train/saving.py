# SPDX-License-Identifier: Apache-2.0
"""What happens to the state between steps: it is saved, and evaluated."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from llm_jepa_jax.checkpoint.manager import Checkpoints
from llm_jepa_jax.config import Config
from llm_jepa_jax.parallel.processes import any_process
from llm_jepa_jax.train.metrics import Window
from llm_jepa_jax.train.state import TrainState, saved_part
from llm_jepa_jax.train.stopping import Stop, Stopped
from llm_jepa_jax.train.watchdog import Watchdog


class Evaluate(Protocol):
    """Scores parameters; `tick` is called again and again, and what it raises ends the evaluation."""

    def __call__(self, params: Any, step: int, tick: Callable[[], None]) -> dict[str, float]: ...
    def quality(self, scores: dict[str, float]) -> float | None:
        """What checkpoints are compared by, higher is better; None where the scores do not hold it."""
        ...


class Record(Protocol):
    """What the metrics lines say so far."""

    window: Window
    scores: dict[str, float]
    """Of the last step, if it is evaluated."""

    def write_scores(self, step: int, scores: dict[str, float]) -> None: ...
    def restart_clock(self) -> None: ...
    def close(self) -> None: ...


class Saver:
    """Saves a step once, with what a bit-equal restart needs beside the state."""

    def __init__(
        self, checkpoints: Checkpoints, recorder: Record, config: Config, watchdog: Watchdog,
        upload: Callable[[], None],
    ):  # fmt: skip
        """`upload` brings the metrics to where the checkpoints are; see `Workdir.upload`."""
        self._checkpoints, self._recorder, self._config, self._watchdog = checkpoints, recorder, config, watchdog
        self._upload = upload

    def _meta(self, step: int) -> dict[str, Any]:
        # All draws come from (seed, step) and (seed, epoch, example), so these two are the whole random state.
        return {"step": step, "seed": self._config.seed, "window": self._recorder.window.sums}

    def __call__(self, step: int, state: TrainState) -> None:
        if step and step not in self._checkpoints.steps():
            self._watchdog.now(f"saving step {step}")
            self._upload()
            with jax.transfer_guard("allow"):  # Orbax copies the shards to the host by itself
                self._checkpoints.save(step, saved_part(state), self._meta(step))

    def before(self, step: int) -> None:
        """Before a step begins: waits for a checkpoint that is still being written, unless the step is near to it.

        So no more is ever at stake than `checkpoint.every_steps` + `checkpoint.ahead_steps`.
        """
        writing = self._checkpoints.writing
        if writing is not None and step - writing > self._config.checkpoint.ahead_steps:
            self._watchdog.now(f"saving step {writing}")
            self._checkpoints.settle()
            self._recorder.restart_clock()
        self._watchdog.now(f"step {step}")

    def last(self, step: int, state: TrainState) -> None:
        """The same, and waits until everything is on disk; does nothing where it is.

        Raises:
            UserError: it cannot be written.
        """
        if step:
            self._watchdog.now(f"saving step {step}")
            self._upload()
            self._checkpoints.finish(step, saved_part(state), self._meta(step))

    def close(self, step: int, state: TrainState) -> None:
        """The same, and no more is saved or recorded."""
        self.last(step, state)
        self._checkpoints.close()
        self._recorder.close()


class Scorer:
    """Evaluates a saved state where that is due and has not been done, by an earlier start of the run either."""

    def __init__(
        self, config: Config, evaluate: Evaluate | None, num_steps: int, recorder: Record, checkpoints: Checkpoints,
        stop: Stop, watchdog: Watchdog, upload: Callable[[], None],
    ):  # fmt: skip
        self._every, self._evaluate, self._num_steps = config.eval.every_steps, evaluate, num_steps
        self._recorder, self._checkpoints, self._stop, self._watchdog = recorder, checkpoints, stop, watchdog
        self._upload = upload

    def due(self, step: int) -> bool:
        """Whether the step is to be evaluated and is not yet."""
        wanted = self._evaluate and step and (step >= self._num_steps or due(step, self._every))
        return bool(wanted) and not self._recorder.scores

    def __call__(self, step: int, state: TrainState) -> None:
        """A signal that comes before the scores are there ends it without them."""
        if not self._evaluate or not any_process(self.due(step)):
            return
        self._watchdog.now(None)
        try:
            with jax.transfer_guard("allow"):
                self._stop.leave()
                scores = self._evaluate(state.whole, step, self._stop.leave)
        except Stopped:
            return
        self._recorder.write_scores(step, scores)
        self._upload()
        self._checkpoints.rate(step, self._evaluate.quality(scores))


def due(step: int, *periods: int) -> bool:
    """Whether one of the periods ends with a step; 0: never."""
    return any(period and step % period == 0 for period in periods)
