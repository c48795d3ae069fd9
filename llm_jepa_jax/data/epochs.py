# SPDX-License-Identifier: Apache-2.0
"""Epochs as one stream of steps, planned in the background while what comes before is trained on.

An epoch is planned in windows of about a million of its examples, in their shuffled order, so that memory and the wait
for the first step do not grow with the corpus; most epochs are one window. Windows are numbered through all epochs.
Rows of one kind follow one another over the windows: what is left of a kind when one ends comes first in the next one,
so a step may hold rows of two, and a window owns the steps whose last row is its own. The order of a window's steps
over the kinds is drawn from (seed, window).
"""

import concurrent.futures
import copy
import dataclasses
import threading
from typing import Any, cast

import numpy as np

from llm_jepa_jax.config import Config
from llm_jepa_jax.data.kinds import Kinds, epoch_order, num_windows, plan_examples
from llm_jepa_jax.data.packing import Plan, no_rows
from llm_jepa_jax.data.views import Costs

KEPT_WINDOWS = 3
_STEP_STREAM = 1


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps that a window owns."""

    plans: tuple[Plan, ...]
    """Rows of each kind, those left by the window before in front."""
    kind_S: np.ndarray
    """int [S]: kind of each step."""
    number_S: np.ndarray
    """int [S]: how many steps of its kind come before it in this window."""


class Epochs:
    """Every window's steps, planned once and kept for a while; pickles without plans.

    Plans depend on (seed, epoch, window) and the data alone. They are made one at a time in a thread of their own: the
    next window's as soon as a window is first read.
    """

    def __init__(self, config: Config, costs: Costs, weights_N: np.ndarray, kinds: Kinds):
        self._config, self._weights_N = config, weights_N
        self.costs, self.kinds = costs, kinds
        self.windows = num_windows(weights_N)
        """Of an epoch."""
        self._left: list[tuple[Plan, ...]] = []
        """Of every window planned so far, the rows of each kind that fill no whole step."""
        self._ends: list[int] = []
        """Steps up to the end of every window planned so far."""
        self._reading = 0
        self._start_threads()

    def _start_threads(self) -> None:
        self._order: tuple[int, np.ndarray, np.random.Generator] | None = None
        self._futures: dict[int, concurrent.futures.Future[Window]] = {}
        self._lock = threading.Lock()  # of the futures
        self._planning = threading.Lock()  # one plan at a time

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None, "_futures": None, "_lock": None, "_planning": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_threads()

    def plans(self, number: int) -> tuple[Plan, ...]:
        """Rows of each kind that a window brings, whichever window's steps they lie in."""
        epoch, window = divmod(number, self.windows)
        kept = self._order
        if kept is None or kept[0] != epoch:
            self._order = kept = epoch, *epoch_order(self._config, self._weights_N, epoch)
        _, order, rng = kept
        part = order[len(order) * window // self.windows : len(order) * (window + 1) // self.windows]
        bits = copy.deepcopy(cast(np.random.PCG64, rng.bit_generator))
        rng = np.random.Generator(bits.jumped(window) if window else bits)
        return plan_examples(self._config, self.costs, self.kinds, epoch, part, rng)

    def tokens(self, plan: Plan) -> int:
        """Tokens that a plan's rows hold, padding not counted and branches counted."""
        branch = max(step.row.branch for step in self.kinds.steps)
        return int((self.costs.tokens(plan.pairs, plan.drawn, plan.examples) + branch * plan.pairs).sum())

    def get(self, number: int) -> Window:
        """A window's steps; the next window's are on their way then."""
        found = self._future(number).result()
        if self._more(number):
            self._future(number + 1)
        return found

    @property
    def last(self) -> int:
        """The last window of `train.num_epochs`."""
        return self._config.train.num_epochs * self.windows - 1

    def _more(self, number: int) -> bool:
        """Whether the run goes on after a window."""
        num_steps = self._config.train.num_steps
        return self._ends[number] < num_steps if num_steps else number < self.last

    def _future(self, number: int) -> "concurrent.futures.Future[Window]":
        with self._lock:
            if number not in self._futures:
                while len(self._futures) >= KEPT_WINDOWS:
                    behind = [kept for kept in self._futures if kept < self._reading]
                    del self._futures[min(behind) if behind else max(self._futures)]
                future = self._futures[number] = concurrent.futures.Future()
                # A daemon: a plan that is no longer wanted does not hold up the end of the program.
                threading.Thread(target=self._work, args=(number, future), name=f"plan-{number}", daemon=True).start()
            return self._futures[number]

    def _work(self, number: int, future: "concurrent.futures.Future[Window]") -> None:
        try:
            with self._planning:
                future.set_result(self._make(number))
        except BaseException as error:  # whatever it is, it belongs to who asks for the window
            future.set_exception(error)

    def _make(self, number: int) -> Window:
        kinds = self.kinds.steps
        while len(self._left) < number:
            self._make(len(self._left))
        nothing = (no_rows(self.costs.num_cuts + self.costs.num_spans),) * len(kinds)
        before = self._left[number - 1] if number else nothing
        plans = [old.then(new) for old, new in zip(before, self.plans(number), strict=True)]
        counts = [len(plan) // kind.rows for plan, kind in zip(plans, kinds, strict=True)]
        kind_S = np.repeat(np.arange(len(kinds)), counts)
        if self._config.data.shuffle:
            np.random.default_rng([self._config.seed, number, _STEP_STREAM]).shuffle(kind_S)
        number_S = np.zeros_like(kind_S)
        for kind, count in enumerate(counts):
            number_S[kind_S == kind] = np.arange(count)
        if number == len(self._left):
            whole = [count * kind.rows for count, kind in zip(counts, kinds, strict=True)]
            self._left.append(tuple(plan.rows(rows, len(plan)) for plan, rows in zip(plans, whole, strict=True)))
            self._ends.append((self._ends[-1] if number else 0) + len(kind_S))
        return Window(tuple(plans), kind_S, number_S)

    def end(self, number: int) -> int:
        """Steps of the stream up to the end of a window."""
        while len(self._ends) <= number:
            self.get(len(self._ends))
        return self._ends[number]

    def remains(self) -> list[tuple[int, Plan]]:
        """(kind, rows) of every kind whose rows up to the end of `train.num_epochs` leave a part of a step."""
        self.end(self.last)
        return [(kind, plan) for kind, plan in enumerate(self._left[self.last]) if len(plan)]

    def locate(self, step: int) -> tuple[int, int]:
        """Window that owns a step of the stream, and the step's place in it."""
        number = int(np.searchsorted(self._ends, step, side="right"))
        while step >= self.end(number):
            number += 1
        return number, step - (self.end(number - 1) if number else 0)

    def step(self, step: int) -> tuple[int, Plan]:
        """Kind and rows of one step. Behind the last of `train.num_epochs` come its remains, a step each."""
        if not self._config.train.num_steps and step >= self.end(self.last):
            return self.remains()[step - self.end(self.last)]
        self._reading, place = self.locate(step)
        window = self.get(self._reading)
        kind, number = int(window.kind_S[place]), int(window.number_S[place])
        rows = self.kinds.steps[kind].rows
        return kind, window.plans[kind].rows(number * rows, (number + 1) * rows)
