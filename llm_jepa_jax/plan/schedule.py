# SPDX-License-Identifier: Apache-2.0
"""The compiled program walked in the order of its schedule: how long a step takes, by the compiler's own cycles.

An instruction takes the core for its estimated cycles. An exchange between devices takes the links for its bytes; one
that is started and awaited apart hides behind what the core does in between, one that fusions drive step by step behind
those fusions alone, and any other makes it wait. Loops count as often as they run.
"""

import collections
import dataclasses
from collections.abc import Callable

from llm_jepa_jax.plan.chips import Chip
from llm_jepa_jax.plan.hlo import Computation, Instruction, Module
from llm_jepa_jax.plan.kernels import IS_KERNEL, attention_kernel
from llm_jepa_jax.plan.links import Links
from llm_jepa_jax.plan.work import FREE, Collective, collective_of, hbm_bytes, product_flops, stage_of

Trips = Callable[[Instruction], int | None]
"""How often a loop runs whose text does not say: None where nobody knows, and then once."""


@dataclasses.dataclass
class Traffic:
    """What one kind of exchange over one route adds up to in a step."""

    num_bytes: float = 0.0
    """Of the arrays on one device."""
    seconds: float = 0.0
    exposed: float = 0.0
    """Seconds that the core waits for it."""
    count: int = 0


@dataclasses.dataclass
class Timeline:
    """One step of one device."""

    compute: float = 0.0
    """Seconds of the core, attention kernels left out."""
    kernels: float = 0.0
    """Seconds of attention kernels."""
    exposed: float = 0.0
    """Seconds that the core waits for links."""
    product_flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    traffic: dict[tuple[tuple[str, ...], str, str], Traffic] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Traffic)
    )
    """By mesh axes, links and kind of exchange."""
    scopes: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    """Seconds of the core by part of the model."""
    unknown_loops: set[str] = dataclasses.field(default_factory=set)
    """Scopes of loops that were counted once."""
    unpriced: set[str] = dataclasses.field(default_factory=set)
    """Custom kernels without an estimate."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.kernels + self.exposed

    @property
    def hidden(self) -> float:
        """Seconds of exchanges behind computation."""
        return sum(traffic.seconds for traffic in self.traffic.values()) - self.exposed


SCOPES = ("ntp_loss", "jepa_loss", "stp_loss", "attention", "mlp")


def _scope(instruction: Instruction) -> str:
    name = instruction.op_name
    return next((scope for scope in SCOPES if scope in name), "embedding, norms, optimizer")


class Walk:
    """Adds up one module."""

    def __init__(self, module: Module, chip: Chip, links: Links, num_devices: int, reach: int, trips: Trips):
        self._module, self._chip, self._links = module, chip, links
        self._num_devices, self._reach, self._trips = num_devices, reach, trips
        self.timeline = Timeline()
        self._now = 0.0
        self._free = {"ICI": 0.0, "DCN": 0.0}  # when each has done what was begun

    def run(self) -> Timeline:
        """The step."""
        self._computation(self._module.computations[self._module.entry], 1)
        return self.timeline

    def _computation(self, computation: Computation, times: int) -> None:
        """Walks it once and counts it `times` times."""
        pending: dict[str, tuple[float, tuple[tuple[str, ...], str, str]]] = {}
        driven: dict[str, tuple[float, tuple[tuple[str, ...], str, str]]] = {}
        for instruction in computation.instructions:
            if instruction.opcode in FREE:
                continue
            if instruction.opcode.endswith("-done") or instruction.opcode == "async-update":
                self._await(instruction, pending, times)
                continue
            if instruction.opcode in ("while", "conditional", "call"):
                self._nested(instruction, times)
                continue
            collective = collective_of(self._module, instruction, self._num_devices)
            if collective and self._drive(computation, instruction, collective, driven, times):
                continue
            if collective:
                self._exchange(computation, instruction, collective, pending, times)
            else:
                self._core(computation, instruction, times)

    def _nested(self, instruction: Instruction, times: int) -> None:
        called = instruction.called
        if instruction.opcode == "while":
            trips = self._module.trips(instruction)
            if trips is None:
                trips = self._trips(instruction)
            if trips is None:
                self.timeline.unknown_loops.add(instruction.op_name or instruction.name)
                trips = 1
            self._computation(self._module.computations[called["body"]], times * trips)
            return
        names = [name for key, name in called.items() if key != "to_apply" or instruction.opcode == "call"]
        if instruction.opcode == "conditional":  # branches take turns: each counts its share
            before = dataclasses.replace(self.timeline)
            for name in names:
                self._computation(self._module.computations[name], times)
            for field in ("compute", "kernels", "exposed", "product_flops", "kernel_flops", "hbm_bytes"):
                start = getattr(before, field)
                setattr(self.timeline, field, start + (getattr(self.timeline, field) - start) / len(names))
            return
        for name in names:
            self._computation(self._module.computations[name], times)

    def _core(self, computation: Computation, instruction: Instruction, times: int) -> float:
        """Time of the core."""
        timeline, chip = self.timeline, self._chip
        flops = product_flops(self._module, computation, instruction)
        moved = hbm_bytes(self._module, computation, instruction)
        timeline.product_flops += times * flops
        timeline.hbm_bytes += times * moved
        kernel = attention_kernel(computation, instruction, self._reach)
        if kernel:
            seconds = kernel.seconds(chip)
            timeline.kernels += times * seconds
            timeline.kernel_flops += times * kernel.flops
        else:
            if IS_KERNEL in instruction.rest:
                timeline.unpriced.add(instruction.name)
            seconds = self._estimate(instruction, moved)
            timeline.compute += times * seconds
        timeline.scopes["attention kernel" if kernel else _scope(instruction)] += times * seconds
        self._now += seconds
        return seconds

    def _estimate(self, instruction: Instruction, moved: float) -> float:
        """The compiler's cycles; where it wrote none, the time that HBM takes for the bytes."""
        cycles = instruction.cycles
        if cycles is not None and self._chip.clock:
            return cycles / self._chip.clock
        if instruction.opcode.endswith("-start") or not self._chip.hbm_bandwidth:
            return 0.0
        return moved / self._chip.hbm_bandwidth

    def _drive(
        self,
        computation: Computation,
        instruction: Instruction,
        collective: Collective,
        driven: dict[str, tuple[float, tuple[tuple[str, ...], str, str]]],
        times: int,
    ) -> bool:
        """A stage of an exchange that several fusions drive; whether it was one. `driven`: seconds left, by channel."""
        stage, channel = stage_of(self._module, instruction) or ("", "")
        if stage == "Start":
            seconds, key, network = self._count(collective, times)
            driven[channel] = max(0.0, self._free[network] - self._now) + seconds, key
        elif channel not in driven:
            return False
        elif stage == "Step":
            left, key = driven[channel]
            driven[channel] = max(0.0, left - self._core(computation, instruction, times)), key
        else:
            left, key = driven.pop(channel)
            self._wait(self._now + left, key, times)
        return True

    def _count(self, collective: Collective, times: int) -> tuple[float, tuple[tuple[str, ...], str, str], str]:
        """Adds an exchange to the traffic: its seconds, where it is counted, and the network it takes."""
        seconds = self._links.seconds(collective)
        route = self._links.route(max(collective.groups, key=len))
        key = (route.axes, route.name, collective.kind)
        traffic = self.timeline.traffic[key]
        traffic.num_bytes += times * collective.num_bytes
        traffic.seconds += times * seconds
        traffic.count += times
        return seconds, key, "DCN" if route.slices > 1 else "ICI"

    def _exchange(
        self,
        computation: Computation,
        instruction: Instruction,
        collective: Collective,
        pending: dict[str, tuple[float, tuple[tuple[str, ...], str, str]]],
        times: int,
    ) -> None:
        seconds, key, network = self._count(collective, times)
        done = self._free[network] = max(self._now, self._free[network]) + seconds
        if instruction.opcode.endswith("-start") or instruction.opcode == "recv":
            pending[instruction.name] = (done, key)
            return
        if instruction.opcode == "fusion":  # products and an exchange in one: both at a time
            self._core(computation, instruction, times)
        self._wait(done, key, times)

    def _await(
        self,
        instruction: Instruction,
        pending: dict[str, tuple[float, tuple[tuple[str, ...], str, str]]],
        times: int,
    ) -> None:
        for operand in instruction.operands:
            if operand not in pending:
                continue
            if instruction.opcode == "async-update":
                pending[instruction.name] = pending.pop(operand)
            else:
                self._wait(*pending.pop(operand), times)

    def _wait(self, until: float, key: tuple[tuple[str, ...], str, str], times: int) -> None:
        exposed = max(0.0, until - self._now)
        self._now += exposed
        self.timeline.exposed += times * exposed
        self.timeline.traffic[key].exposed += times * exposed
