# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere. Everything is on stderr."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG = logging.getLogger("llm_jepa_jax")
LINE_SECONDS = 15.0
"""Without a terminal, a progress line is printed no more often than this."""


class Bar:
    """Progress of `total` units of work; a context manager."""

    def __init__(self, what: str, total: int, done: int = 0, visible: bool = True):
        self._what, self._total, self._done, self._first = what, total, done, done
        self._start = self._last_line = time.monotonic()
        self._visible, self._text = visible, ""
        self._live = None
        if visible and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._live = Progress(*columns, console=Console(stderr=True))
            self._task = self._live.add_task(what, total=total, completed=done, text="")

    def __enter__(self) -> "Bar":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, done: int, text: str | None = None) -> None:
        """Moves to `done` units, with a new text beside the bar if one is given."""
        self._done, self._text = done, self._text if text is None else text
        if self._live:
            self._live.update(self._task, completed=done, text=self._text)
        elif self._visible and (time.monotonic() - self._last_line > LINE_SECONDS or done == self._total):
            self._last_line = time.monotonic()
            LOG.info("%s %d/%d  %s  %s left", self._what, done, self._total, self._text, self._left())

    def _left(self) -> str:
        steps = self._done - self._first
        if not steps:
            return "?"
        seconds = int((time.monotonic() - self._start) / steps * (self._total - self._done))
        return f"{seconds // 60}:{seconds % 60:02d}"


def loss_text(values: dict[str, float]) -> str:
    """The losses and speeds of a metrics line, in short."""
    names = {"ntp_loss": "ntp", "jepa_loss": "jepa", "cos_pair": "cos"}
    parts = [f"{short} {values[name]:.3f}" for name, short in names.items() if name in values]
    if "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:,.0f} tok/s  {values['examples_per_s']:.0f} ex/s")
    return "  ".join(parts)
