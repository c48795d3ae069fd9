# SPDX-License-Identifier: Apache-2.0
"""The training loop, top to bottom: mesh, state, restore, step, loop, save."""

import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jepa_jax.batch import Batch, StepShape, check_batch
from llm_jepa_jax.checkpoint.manager import Checkpoints
from llm_jepa_jax.checkpoint.workdir import Workdir
from llm_jepa_jax.config import Config
from llm_jepa_jax.data.pipeline import TrainData
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.flops import model_flops
from llm_jepa_jax.models.transformer import count_params
from llm_jepa_jax.objectives.diagnostics import collapse_metrics, collapse_warnings
from llm_jepa_jax.objectives.total import enabled
from llm_jepa_jax.parallel.sharding import global_batch, num_row_shards, row_parts
from llm_jepa_jax.train.metrics import MetricsWriter, Window, device_peak_flops, last_values, valid_pairs
from llm_jepa_jax.train.phases import Phases
from llm_jepa_jax.train.progress import Bar, loss_text
from llm_jepa_jax.train.saving import Evaluate, Saver, Scorer, due
from llm_jepa_jax.train.state import StateFactory, TrainState, saved_part
from llm_jepa_jax.train.step_flops import step_flops, traced_step
from llm_jepa_jax.train.stopping import stop_on_sigterm
from llm_jepa_jax.train.stragglers import Stragglers
from llm_jepa_jax.train.watchdog import Watchdog

LOG = logging.getLogger("llm_jepa_jax")


@dataclasses.dataclass
class Result:
    """Where training ended."""

    state: TrainState
    step: int
    metrics: dict[str, float]
    """The last metrics line."""
    stopped_early: bool
    """A signal asked for a stop; the state is saved, and steps or the last evaluation are left to do."""


class Recorder:
    """Reads a step's metrics one step late, adds them to the window, and writes a line each period."""

    def __init__(self, config: Config, mesh: Mesh, workdir: pathlib.Path, step: int, window: Window):
        self._config, self.window = config, window
        self._writer = MetricsWriter(workdir, step, config.log.tensorboard) if jax.process_index() == 0 else None
        self.last, self.scores = last_values(workdir, step)
        """The last training line, and the scores of the last step."""
        self._pending: tuple[int, int, float, Any] | None = None
        self._terms = [objective.name for objective in enabled(config.objective)]
        self._peak = device_peak_flops(mesh.devices.flat[0].device_kind)
        self._num_devices = mesh.size
        self._collapsed = False
        self.restart_clock()

    def timed(self, fetch: Callable[[], Any]) -> Any:
        """Calls `fetch` and counts its time as waiting for data."""
        start = time.monotonic()
        fetched = fetch()
        self._waited += time.monotonic() - start
        return fetched

    def push(self, step: int, row_length: int, flops: float, metrics: Any) -> None:
        """Takes the metrics of the step just dispatched, and reads those of the step before."""
        self.flush()
        self._pending = (step, row_length, flops, metrics)
        self.scores = {}

    def flush(self) -> None:
        """Reads what is pending.

        Raises:
            FloatingPointError: too many non-finite updates in a row.
        """
        if self._pending is None:
            return
        (step, row_length, flops, metrics), self._pending = self._pending, None
        host = jax.device_get({"sums": metrics["sums"], "last": metrics["last"]})
        self.window.add(host["sums"] | {"flops": flops, "steps": 1})
        tokens, targets = float(host["sums"]["tokens"]), float(host["sums"]["target_tokens"])
        self._tokens += tokens
        self._examples += float(host["sums"]["examples"])
        frozen = self._config.lora.rank > 0
        self._flops += model_flops(self._config.model, tokens, targets, row_length, frozen)
        if host["last"]["skipped_in_row"] == 1:
            LOG.warning("step %d: loss or gradient is not finite; this update is skipped", step)
        if step % self._config.log.every_steps == 0:
            self._line(step, host["last"], metrics["embeddings"])
        if host["last"]["skipped_in_row"] >= self._config.train.max_skipped:
            raise FloatingPointError(
                f"{int(host['last']['skipped_in_row'])} updates in a row were not finite, the last at step {step}"
            )

    def _line(self, step: int, last: dict[str, Any], embeddings: Any) -> None:
        values = self.window.means() | {name: float(last[name]) for name in sorted(last) if name != "skipped_in_row"}
        values |= collapse_metrics(*valid_pairs(jax.device_get(embeddings)))
        self._warn_of_collapse(step, values)
        for term in self.window.idle_terms(self._terms):
            LOG.warning("step %d: the %s term had no weight since the last metrics line", step, term)
        seconds = max(time.monotonic() - self._clock, 1e-9)
        values["tokens_per_s"], values["examples_per_s"] = self._tokens / seconds, self._examples / seconds
        values["data_wait_share"] = min(1.0, self._waited / seconds)
        if self._peak:
            values["mfu"] = self._flops / seconds / (self._peak * self._num_devices)
        self.restart_clock()
        self.window.sums.clear()
        self.last = values
        self.write(step, values)

    def _warn_of_collapse(self, step: int, values: dict[str, float]) -> None:
        """Once, until the measures are above their floors again."""
        log = self._config.log
        found = collapse_warnings(values, log.rank_floor, log.std_floor, log.cos_ceiling)
        if found and not self._collapsed:
            LOG.warning(
                "step %d: %s; the embeddings collapse, consider objective.sigreg.weight or objective.vicreg.weight",
                step,
                "; ".join(found),
            )
        self._collapsed = bool(found)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._writer:
            self._writer.write(step, values)

    def write_scores(self, step: int, scores: dict[str, float]) -> None:
        """Writes an evaluation's line."""
        self.scores = scores
        self.write(step, scores)

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def restart_clock(self) -> None:
        """Leaves time spent outside training (evaluation, saving) out of the speeds."""
        self._clock, self._waited = time.monotonic(), 0.0
        self._tokens = self._examples = self._flops = 0.0


def train(
    factory: StateFactory, data: TrainData, workdir: Workdir, phases: Phases, evaluate: Evaluate | None
) -> Result:
    """Trains until the last step or a SIGTERM, from the newest valid checkpoint in `workdir` if there is one.

    Raises UserError where the last checkpoint cannot be written, or updates stay non-finite (the state is saved first).
    """
    config, mesh = factory.config, factory.mesh
    # --- state, metrics and data, all at the newest valid checkpoint
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint)
    with phases.phase("restore or create the state"):
        step, state, meta = _first_state(factory, checkpoints)
    recorder = Recorder(config, mesh, workdir.files, step, Window(meta.get("window")))
    batches = data.iterator(step, row_parts(mesh), num_row_shards(mesh))
    rows = _global_batches(mesh, batches, data.kinds)
    watchdog = Watchdog(config.train.hang_seconds, config.train.exit_on_hang)
    save = Saver(checkpoints, recorder, config, watchdog, workdir.upload)
    with phases.phase("compile the step"):
        train_steps, flops = zip(*(_compiled_step(factory, data.num_steps, kind) for kind in data.kinds), strict=True)
    # --- loop
    with stop_on_sigterm() as stop, watchdog:
        score = Scorer(config, evaluate, data.num_steps, recorder, checkpoints, stop, watchdog, workdir.upload)
        try:
            score(step, state)
            with (
                phases.phase("train"),
                Bar("train", data.num_steps, step, jax.process_index() == 0) as bar,
                contextlib.closing(batches),
                _profiler(config, workdir.files) as profile,
                _stragglers(config, step) as stragglers,
                jax.transfer_guard("disallow"),
            ):
                recorder.restart_clock()
                while step < data.num_steps and not stop.reached():
                    save.before(step + 1)
                    profile(step + 1)
                    kind, batch = recorder.timed(lambda: next(rows))
                    stragglers.here(step + 1)
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, metrics = train_steps[kind](state, batch)
                    step += 1
                    recorder.push(step, data.kinds[kind].row.length, flops[kind], metrics)
                    bar.update(step, loss_text(recorder.last))
                    if step < data.num_steps and due(step, config.eval.every_steps, config.checkpoint.every_steps):
                        recorder.flush()
                        save(step, state)
                        score(step, state)
                        recorder.restart_clock()
                recorder.flush()
            save.last(step, state)  # before the last evaluation, which may take long
            score(step, state)
        except FloatingPointError as error:
            save.close(step, state)
            words = f"training stopped: {error}; the state is saved at step {step}; lower opt.learning_rate"
            raise UserError(words) from error
        save.close(step, state)
    stopped = step < data.num_steps or score.due(step)
    if stopped:
        LOG.warning("asked to stop: the state is saved at step %d; the same command goes on from there", step)
    return Result(state, step, recorder.last | recorder.scores, stopped)


def _first_state(factory: StateFactory, checkpoints: Checkpoints) -> tuple[int, TrainState, dict[str, Any]]:
    """The newest valid checkpoint's step, state and what was kept beside it; else a new state."""
    found = checkpoints.restore_latest(saved_part(factory.abstract))
    step, state, meta = (found[0], factory.completed(found[1]), found[2]) if found else (0, factory.create(), {})
    origin = f"checkpoint {step}" if found else factory.origin
    LOG.info("starting from %s: %s parameters to train", origin, f"{count_params(state.params):,}")
    return step, state, meta


def _compiled_step(factory: StateFactory, num_steps: int, kind: StepShape) -> tuple[Any, float]:
    """The step of a kind, and its FLOPs."""
    start = time.monotonic()
    traced = traced_step(factory, num_steps, kind)
    with jax.set_mesh(factory.mesh):
        compiled = traced.lower().compile()
    flops = step_flops(factory, num_steps, kind, traced)
    LOG.info("compiled: %s, %.4g GFLOP (%.1f s)", kind, flops / 1e9, time.monotonic() - start)
    return compiled, flops


def _global_batches(
    mesh: Mesh, batches: Iterator[dict[str, Any]], kinds: Sequence[StepShape]
) -> Iterator[tuple[int, Batch]]:
    """Each step's kind and global batch; the first one of each kind is held to the contract."""
    checked = set()
    for values in batches:
        with jax.transfer_guard_host_to_device("allow"):  # the one copy that is meant
            kind, batch = int(values["kind"]), global_batch(mesh, values)
        if kind not in checked:
            check_batch(batch, kinds[kind].rows, kinds[kind].row)
            checked.add(kind)
        yield kind, batch


@contextlib.contextmanager
def _profiler(config: Config, workdir: pathlib.Path) -> Iterator[Callable[[int], None]]:
    """Traces steps `profile_start` to `profile_start + profile_steps - 1` into `profile/`, given each step's number."""
    start, running = config.train.profile_start, False

    def at(step: int) -> None:
        nonlocal running
        if start and step == start:
            jax.profiler.start_trace(str(workdir / "profile"))
            running = True
        elif running and step == start + config.train.profile_steps:
            jax.profiler.stop_trace()
            running = False

    yield at
    if running:
        jax.profiler.stop_trace()


def _stragglers(config: Config, step: int) -> Stragglers:
    """Watches the steps after `step` that have a metrics line."""
    every = config.log.every_steps
    return Stragglers(step - step % every + every, every, config.log.straggler_seconds)
