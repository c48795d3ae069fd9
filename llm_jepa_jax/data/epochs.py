# SPDX-License-Identifier: Apache-2.0
"""Epochs as one stream of steps, each planned in the background while the one before it is trained on.

Rows of one kind follow one another over the epochs: what is left of a kind when an epoch ends comes first in the next
one, so a step may hold rows of two epochs, and an epoch owns the steps whose last row is its own. The order of an
epoch's steps over the kinds is drawn from (seed, epoch).
"""

import concurrent.futures
import dataclasses
import threading
from typing import Any

import numpy as np

from llm_jepa_jax.config import Config
from llm_jepa_jax.data.kinds import Kinds, plan_epoch
from llm_jepa_jax.data.packing import Plan, no_rows
from llm_jepa_jax.data.views import Costs

KEPT_EPOCHS = 3
_STEP_STREAM = 1


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The steps that an epoch owns."""

    plans: tuple[Plan, ...]
    """Rows of each kind, those left by the epoch before in front."""
    kind_S: np.ndarray
    """int [S]: kind of each step."""
    number_S: np.ndarray
    """int [S]: how many steps of its kind come before it in this epoch."""


class Epochs:
    """Every epoch's steps, planned once and kept for a while; pickles without plans.

    Plans depend on (seed, epoch) and the data alone. They are made one at a time in a thread of their own: the next
    epoch's as soon as an epoch is first read.
    """

    def __init__(self, config: Config, costs: Costs, weights_N: np.ndarray, kinds: Kinds):
        self._config, self._weights_N = config, weights_N
        self.costs, self.kinds = costs, kinds
        self._left: list[tuple[Plan, ...]] = []
        """Of every epoch planned so far, the rows of each kind that fill no whole step."""
        self._ends: list[int] = []
        """Steps up to the end of every epoch planned so far."""
        self._reading = 0
        self._start_threads()

    def _start_threads(self) -> None:
        self._futures: dict[int, concurrent.futures.Future[Epoch]] = {}
        self._lock = threading.Lock()  # of the futures
        self._planning = threading.Lock()  # one plan at a time

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_futures": None, "_lock": None, "_planning": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_threads()

    def plans(self, epoch: int) -> tuple[Plan, ...]:
        """Rows of each kind that an epoch brings, whichever epoch's steps they lie in."""
        return plan_epoch(self._config, self.costs, self._weights_N, self.kinds, epoch)

    def tokens(self, plan: Plan) -> int:
        """Tokens that a plan's rows hold, padding not counted and branches counted."""
        branch = max(step.row.branch for step in self.kinds.steps)
        return int((self.costs.tokens(plan.pairs, plan.drawn, plan.examples) + branch * plan.pairs).sum())

    def get(self, epoch: int) -> Epoch:
        """An epoch's steps; the next epoch's are on their way then."""
        found = self._future(epoch).result()
        if self._more(epoch):
            self._future(epoch + 1)
        return found

    def _more(self, epoch: int) -> bool:
        """Whether the run goes on after an epoch."""
        train = self._config.train
        return self._ends[epoch] < train.num_steps if train.num_steps else epoch + 1 < train.num_epochs

    def _future(self, epoch: int) -> "concurrent.futures.Future[Epoch]":
        with self._lock:
            if epoch not in self._futures:
                while len(self._futures) >= KEPT_EPOCHS:
                    behind = [kept for kept in self._futures if kept < self._reading]
                    del self._futures[min(behind) if behind else max(self._futures)]
                future = self._futures[epoch] = concurrent.futures.Future()
                # A daemon: a plan that is no longer wanted does not hold up the end of the program.
                threading.Thread(target=self._work, args=(epoch, future), name=f"plan-{epoch}", daemon=True).start()
            return self._futures[epoch]

    def _work(self, epoch: int, future: "concurrent.futures.Future[Epoch]") -> None:
        try:
            with self._planning:
                future.set_result(self._make(epoch))
        except BaseException as error:  # whatever it is, it belongs to who asks for the epoch
            future.set_exception(error)

    def _make(self, epoch: int) -> Epoch:
        kinds = self.kinds.steps
        while len(self._left) < epoch:
            self._make(len(self._left))
        before = self._left[epoch - 1] if epoch else (no_rows(self.costs.num_cuts + self.costs.num_spans),) * len(kinds)
        plans = [old.then(new) for old, new in zip(before, self.plans(epoch), strict=True)]
        counts = [len(plan) // kind.rows for plan, kind in zip(plans, kinds, strict=True)]
        kind_S = np.repeat(np.arange(len(kinds)), counts)
        if self._config.data.shuffle:
            np.random.default_rng([self._config.seed, epoch, _STEP_STREAM]).shuffle(kind_S)
        number_S = np.zeros_like(kind_S)
        for kind, count in enumerate(counts):
            number_S[kind_S == kind] = np.arange(count)
        if epoch == len(self._left):
            whole = [count * kind.rows for count, kind in zip(counts, kinds, strict=True)]
            self._left.append(tuple(plan.rows(rows, len(plan)) for plan, rows in zip(plans, whole, strict=True)))
            self._ends.append((self._ends[-1] if epoch else 0) + len(kind_S))
        return Epoch(tuple(plans), kind_S, number_S)

    def end(self, epoch: int) -> int:
        """Steps of the stream up to the end of an epoch."""
        while len(self._ends) <= epoch:
            self.get(len(self._ends))
        return self._ends[epoch]

    def remains(self, epoch: int) -> list[tuple[int, Plan]]:
        """(kind, rows) of every kind whose rows up to the end of an epoch leave a part of a step."""
        self.end(epoch)
        return [(kind, plan) for kind, plan in enumerate(self._left[epoch]) if len(plan)]

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch that owns a step of the stream, and the step's place in it."""
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        while step >= self.end(epoch):
            epoch += 1
        return epoch, step - (self.end(epoch - 1) if epoch else 0)

    def step(self, step: int) -> tuple[int, Plan]:
        """Kind and rows of one step. Behind the last of `train.num_epochs` come its remains, a step each."""
        train = self._config.train
        if not train.num_steps and step >= self.end(train.num_epochs - 1):
            return self.remains(train.num_epochs - 1)[step - self.end(train.num_epochs - 1)]
        self._reading, place = self.locate(step)
        epoch = self.get(self._reading)
        kind, number = int(epoch.kind_S[place]), int(epoch.number_S[place])
        rows = self.kinds.steps[kind].rows
        return kind, epoch.plans[kind].rows(number * rows, (number + 1) * rows)
