# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run goes: one log line and one entry of `phases.json` for each phase."""

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Iterator

from llm_jepa_jax.text.checkpoint_files import write_whole

LOG = logging.getLogger("llm_jepa_jax")


class Phases:
    """Seconds by phase, added over the restarts of a run."""

    def __init__(self, workdir: pathlib.Path | None):
        self._path = workdir / "phases.json" if workdir else None
        self.seconds: dict[str, float] = {}
        self._inner = 0.0
        if self._path and self._path.exists():
            with contextlib.suppress(json.JSONDecodeError):  # torn by a kill: timings are not worth stopping for
                self.seconds = json.loads(self._path.read_text())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block as `name`; a phase inside another counts for itself alone."""
        LOG.info("%s …", name)
        start, outer, self._inner = time.monotonic(), self._inner, 0.0
        yield
        whole = time.monotonic() - start
        self._add(name, whole - self._inner)
        self._inner = outer + whole
        LOG.info("%s: %.1f s", name, whole)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if self._path:
            seconds = {key: round(value, 3) for key, value in self.seconds.items()}
            try:
                write_whole(self._path, json.dumps(seconds).encode())
            except OSError as error:  # timings are not worth stopping for
                LOG.warning("%s: not written (%s)", self._path, error.strerror)
