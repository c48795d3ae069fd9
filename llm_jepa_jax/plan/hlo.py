# SPDX-License-Identifier: Apache-2.0
"""A compiled program's text as instructions: what runs, in which order, how often, on which shapes.

The text is XLA's own form of a scheduled module (`compiled.as_text()`). TPU compilers write their estimate of an
instruction's core cycles beside it; loops of known length say how often their body runs, or compare a counter from 0
with a constant.
"""

import dataclasses
import functools
import math
import re

WIDTHS = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
    "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
"""Bytes of an element by XLA's name of its type; anything else (tokens) takes none."""
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
END = re.compile(r'^\}(, execution_thread="\w+")?\s*$')
CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
OP_NAME = re.compile(r'op_name="([^"]*)"')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape."""

    kind: str
    """XLA's name of the element type."""
    sizes: tuple[int, ...]
    on_chip: bool = False
    """It lies in the chip's own fast memory, not in HBM."""

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def num_bytes(self) -> float:
        return self.elements * WIDTHS.get(self.kind, 0)


def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as XLA writes it: one, or those of a tuple in order."""
    found = []
    for kind, sizes, layout in ARRAY.findall(shape):
        numbers = tuple(int(size) for size in sizes.split(",") if size)
        found.append(Array(kind, numbers, "S(1)" in layout))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    """Attributes, metadata and the compiler's notes."""
    is_root: bool
    body: str = ""
    """What stands between the parentheses: a constant's value, a parameter's number."""

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result."""
        return arrays_of(self.shape)

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations that it runs, by what for; branches as `branch0`, `branch1`, …"""
        found = dict(CALLED.findall(self.rest))
        branches = BRANCHES.search(self.rest)
        names = branches.group(1).split(",") if branches else []
        return found | {f"branch{i}": name.strip().lstrip("%") for i, name in enumerate(names)}

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of core cycles; None where it has none."""
        found = CYCLES.search(self.rest)
        return int(found.group(1)) if found else None

    @property
    def op_name(self) -> str:
        """The path of named scopes that it comes from."""
        found = OP_NAME.search(self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of the schedule."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @functools.cached_property
    def users(self) -> dict[str, tuple[Instruction, ...]]:
        """Who reads an instruction's result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in instruction.operands:
                found.setdefault(operand, []).append(instruction)
        return {name: tuple(readers) for name, readers in found.items()}

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """Its parameters by number."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.body)))


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs; None where the text does not say."""
        known = KNOWN_TRIPS.search(loop.rest)
        if known:
            return int(known.group(1))
        return self._bound(self.computations[loop.called["condition"]])

    def _bound(self, condition: Computation) -> int | None:
        """The constant that a counter is compared with, directly or inside a fusion of the comparison."""
        root = condition.root
        if root.opcode == "fusion":
            inner = self.computations[root.called["calls"]]
            if inner.root.opcode != "compare" or "direction=LT" not in inner.root.rest:
                return None
            sides = [inner.by_name[name] for name in inner.root.operands]
            outer = [
                condition.by_name[root.operands[int(side.body)]] if side.opcode == "parameter" else side
                for side in sides
            ]
            return _constant(outer[1])
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        return _constant(condition.by_name[root.operands[1]])


def _constant(instruction: Instruction) -> int | None:
    is_number = instruction.opcode == "constant" and instruction.body.lstrip("-").isdigit()
    return int(instruction.body) if is_number else None


def parse(text: str) -> Module:
    """The module that XLA's text says.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    lines: list[str] = []
    for line in _joined(text):
        opened = COMPUTATION.match(line)
        if opened:
            name, lines = opened.group(2), []
            entry = name if opened.group(1) else entry
        elif END.match(line) and name:
            computations[name] = Computation(name, tuple(_instruction(each) for each in lines))
            name = ""
        elif name:
            lines.append(line)
    if not entry:
        raise ValueError("no ENTRY computation in this text")
    return Module(computations, entry)


def _joined(text: str) -> list[str]:
    """Lines; what attributes spell over several lines is one again."""
    lines: list[str] = []
    for line in text.splitlines():
        goes_on = lines and HEAD.match(lines[-1]) and line.strip() and not HEAD.match(line) and not END.match(line)
        if goes_on:
            lines[-1] += line
        else:
            lines.append(line)
    return lines


def _instruction(line: str) -> Instruction:
    head = HEAD.match(line)
    if head is None:
        raise ValueError(f"not an instruction: {line[:80]!r}")
    start = head.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    shape = line[start:end]
    opening = line.index("(", end)
    opcode = line[end:opening].strip()
    closing = _closing(line, opening)
    body = line[opening + 1 : closing - 1]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", body))
    return Instruction(head.group(2), opcode, shape, operands, line[closing:], bool(head.group(1)), body)


def _closing(line: str, opening: int) -> int:
    """The place behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if not depth:
            return place + 1
    raise ValueError(f"unbalanced parentheses: {line[:80]!r}")
