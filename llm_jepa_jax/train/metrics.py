# SPDX-License-Identifier: Apache-2.0
"""Metrics: sums added over a window of steps, the files they go to, and their restart."""

import json
import logging
import math
import pathlib
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from llm_jepa_jax.text.checkpoint_files import write_whole

LOG = logging.getLogger("llm_jepa_jax")
DEVICE_PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU7x": 2307.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
}
"""Published dense bfloat16 peak by the start of `device_kind`, in TFLOP/s."""


def device_peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known (CPUs)."""
    matches = [kind for kind in DEVICE_PEAK_TFLOPS if device_kind.startswith(kind)]
    return DEVICE_PEAK_TFLOPS[max(matches, key=len)] * 1e12 if matches else None


class Window:
    """Sums over the steps since the last metrics line. Its state travels in the checkpoint."""

    def __init__(self, sums: dict[str, float] | None = None):
        self.sums = dict(sums or {})

    def add(self, sums: dict[str, Any]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def means(self) -> dict[str, float]:
        """Losses as sum / weight; a term without weight in the window has no entry (it is counted instead)."""
        sums = self.sums
        out = {}
        for name in sorted(sums):
            term = name.removesuffix("_weight")
            if term != name and sums[name] > 0:
                out[f"{term}_loss"] = sums[f"{term}_sum"] / sums[name]
        if sums["pairs"] > 0:
            out["cos_pair"] = sums["cos_sum"] / sums["pairs"]
        out["target_tokens"], out["pairs"], out["examples"] = sums["target_tokens"], sums["pairs"], sums["examples"]
        if sums.get("steps"):  # a window of an older run may have none yet
            out["step_flops"] = sums["flops"] / sums["steps"]
        out["padding_share"] = 1.0 - sums["tokens"] / sums["slots"]
        return out

    def idle_terms(self, enabled: Iterable[str]) -> list[str]:
        """Enabled terms that had no weight in the window; steps without pairs do not even name them."""
        return [name for name in enabled if not self.sums.get(f"{name}_weight")]


class MetricsWriter:
    """`metrics.jsonl` and `tensorboard/` of a run; only process 0 makes one."""

    def __init__(self, workdir: pathlib.Path, start_step: int, tensorboard: bool):
        self._path = workdir / "metrics.jsonl"
        self._drop_after(start_step)
        self._path.touch()
        self._size, self._unwritten = self._path.stat().st_size, b""
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # half a second of imports, wanted only here

            purge = {"purge_step": start_step + 1} if start_step else {}
            before = set(threading.enumerate())
            self._board = SummaryWriter(str(workdir / "tensorboard"), **purge)
            self._board_threads = set(threading.enumerate()) - before

    def _drop_after(self, step: int) -> None:
        """Drops what a killed run wrote after the checkpoint it is resumed from (and a torn last line)."""
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
        write_whole(self._path, "".join(kept).encode())

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line. Values that are not finite are written as strings, so that the file stays JSON."""
        line = {"step": step} | {name: _rounded(value) for name, value in values.items()}
        healthy = not self._unwritten
        self._unwritten += json.dumps(line).encode() + b"\n"
        try:
            self._append()
        except OSError as error:
            if healthy:
                LOG.warning("%s: cannot be written (%s); lines are kept until it can", self._path, error.strerror)
        if self._board and not all(thread.is_alive() for thread in self._board_threads):
            LOG.warning("%s: cannot be written any more; metrics.jsonl goes on", self._board.logdir)
            self._board = None  # it would wait for its thread, which a full disk has ended, for ever
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _append(self) -> None:
        """Writes the lines that are not on disk yet, behind those that are: what a failed write left is cut off."""
        with self._path.open("r+b", buffering=0) as file:
            file.truncate(self._size)
            file.seek(self._size)
            while self._unwritten:
                written = file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
                self._size += written

    def close(self) -> None:
        """Raises OSError: lines could not be written."""
        self._append()
        if self._board:
            self._board.close()


def last_values(workdir: pathlib.Path, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """What `metrics.jsonl` already says: the last training line up to `step`, and the scores written at `step`."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    known = [json.loads(line) for line in lines if _step_of(line) <= step]
    training = [line for line in known if "total_loss" in line]
    scores = [line for line in known if "total_loss" not in line and line["step"] == step]
    without_step = [{name: v for name, v in line.items() if name != "step"} for line in (training[-1:] + scores[-1:])]
    last = without_step[0] if training else {}
    return last, without_step[-1] if scores else {}


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _rounded(value: float) -> float | int | str:
    if not math.isfinite(value):
        return str(value)
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.9g}")


def valid_pairs(embeddings: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Text and code embeddings [n, D] of the slots in use, from [R, s, D] arrays with weights [R, s]; n may be 0."""
    text, code, weight = (np.asarray(x) for x in embeddings)
    used = weight > 0
    return text[used], code[used]
