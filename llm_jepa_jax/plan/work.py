# SPDX-License-Identifier: Apache-2.0
"""What one instruction of a compiled program does: floating-point operations, bytes of HBM, bytes over links."""

import dataclasses
import math
import re

from llm_jepa_jax.plan.hlo import Array, Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "optimization-barrier", "opt-barrier", "send", "send-done",
}  # fmt: skip
"""They move nothing."""
NOTHING_MOVED = re.compile(r'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound|ConcatBitcast)"')
"""Calls that give memory a name: what they return is written by others, or lies there already."""
BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x[^"]*",_xla_megascale_transfer_type="([A-Z_]+)"')
GROUPS_OF_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*(?:\([\d,]*\))?)\))? \{([^}]*)\}"
)
GROUPS_OF_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
GROUPS_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
WINDOW = re.compile(r"window=\{([^}]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices."""

    kind: str
    """One of `COLLECTIVES`."""
    num_bytes: float
    """Of the whole array on one device of a group: what is gathered, reduced or exchanged."""
    groups: tuple[tuple[int, ...], ...]
    """Devices by their place in the mesh; for a permutation, pairs of source and target."""


def collective_of(module: Module, instruction: Instruction, num_devices: int) -> Collective | None:
    """The exchange that an instruction is or starts; None for others.

    A TPU's reduce-scatter is a fusion around an all-reduce of which each device keeps a slice. What its SparseCores
    exchange is a call of theirs, started and awaited.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if instruction.opcode == "call-start":
        return _inside(module, module.computations[instruction.called["to_apply"]], num_devices)
    if opcode in ("async", "fusion") and "calls" in instruction.called:
        inner = _inside(module, module.computations[instruction.called["calls"]], num_devices)
        if inner is None or opcode == "async":
            return inner
        out = sum(array.num_bytes for array in instruction.arrays)
        scattered = inner.kind == "all-reduce" and out < inner.num_bytes
        return dataclasses.replace(inner, kind="reduce-scatter") if scattered else inner
    if opcode == "recv":
        return _between_slices(instruction, num_devices)
    if opcode not in COLLECTIVES:
        return None
    pairs = PAIRS.search(instruction.rest)
    groups = _pairs(pairs.group(1)) if pairs else replica_groups(instruction.rest, num_devices)
    sizes = [array.num_bytes for array in instruction.arrays]
    if instruction.opcode.endswith("-start") and opcode != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]  # a start gives (operands, results)
    total = sum(sizes)
    if opcode == "reduce-scatter":
        total *= len(groups[0])
    return Collective(opcode, total, groups)


def _between_slices(instruction: Instruction, num_devices: int) -> Collective | None:
    """What a TPU's hosts exchange between slices: a send to them and a receive, which is counted."""
    found = BETWEEN_SLICES.search(instruction.rest)
    if not found:
        return None
    spans = [span.partition(":") for span in found.group(1).split(",")]
    slices = sum(int(last or first) - int(first) + 1 for first, _, last in spans)
    group = tuple(range(0, num_devices, num_devices // slices))
    return Collective(found.group(2).lower().replace("_", "-"), instruction.arrays[0].num_bytes, (group,))


def _inside(module: Module, computation: Computation, num_devices: int) -> Collective | None:
    found = (collective_of(module, instruction, num_devices) for instruction in computation.instructions)
    return next((collective for collective in found if collective), None)


CHANNEL = re.compile(r"channel_id=(\d+)")
STAGE = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')


def stage_of(module: Module, fusion: Instruction) -> tuple[str, str] | None:
    """The stage of an exchange that a TPU program drives from several fusions, and the channel of the exchange.

    Its `Start`, its `Done`, or a `Step`: a fusion that computes something else meanwhile. Each repeats the exchange's
    instruction. None where there is no exchange inside. An exchange that is whole in one fusion looks like a step whose
    channel nobody has started.
    """
    if fusion.opcode != "fusion":
        return None
    inside = module.computations[fusion.called["calls"]].instructions
    channels = (CHANNEL.search(each.rest) for each in inside if each.opcode in COLLECTIVES)
    channel = next((found.group(1) for found in channels if found), None)
    if channel is None:
        return None
    stages = (STAGE.search(each.rest) for each in inside)
    return next((found.group(1) for found in stages if found), "Step"), channel


def replica_groups(text: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of devices, in any of the forms that XLA writes; all devices together where none is given."""
    mesh = GROUPS_OF_MESH.search(text)
    if mesh:
        return _groups_of_mesh(*mesh.groups())
    iota = GROUPS_OF_IOTA.search(text)
    if iota:
        shape, order = _numbers(iota.group(1)), iota_order(*iota.groups()[1:])
        size = math.prod(shape) // shape[0]
        return tuple(tuple(order[start : start + size]) for start in range(0, len(order), size))
    listed = GROUPS_LISTED.search(text)
    groups = re.findall(r"\{([\d,]*)\}", listed.group(1)) if listed else []
    return tuple(_numbers(group) for group in groups) or (tuple(range(num_devices)),)


def iota_order(sizes: str, transposed: str | None) -> list[int]:
    """Device numbers of XLA's `[sizes]T(permutation)`: an iota of that shape, transposed, flattened."""
    shape = _numbers(sizes)
    permutation = _numbers(transposed) if transposed else tuple(range(len(shape)))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    order = [0]
    for axis in permutation:
        order = [base + step * strides[axis] for base in order for step in range(shape[axis])]
    return order


def _groups_of_mesh(axes: str, ids: str | None, together: str) -> tuple[tuple[int, ...], ...]:
    """Groups over some axes of a named mesh, whose devices may stand in another order."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    wanted = re.findall(r"'([^']+)'", together)
    order = list(range(math.prod(sizes.values())))
    if ids:
        found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)
        if found:
            order = iota_order(*found.groups())
    names = list(sizes)
    axis_order = [names.index(name) for name in names if name not in wanted] + [names.index(name) for name in wanted]
    shape = ",".join(str(size) for size in sizes.values())
    flat = iota_order(shape, ",".join(map(str, axis_order)))
    size = math.prod(sizes[name] for name in wanted)
    return tuple(tuple(order[i] for i in flat[start : start + size]) for start in range(0, len(flat), size))


def _pairs(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_numbers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def product_flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """FLOPs of matrix products in an instruction, those inside a fusion included; 2 a multiplication."""
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called["calls"]]
        return sum(product_flops(module, inner, each) for each in inner.instructions)
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    sides = [computation.by_name[name].arrays[0] for name in instruction.operands[:2]]
    result = instruction.arrays[0]
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        axes = _numbers(contracted.group(1)) if contracted else ()
        return 2.0 * result.elements * math.prod(sides[0].sizes[axis] for axis in axes)
    return _convolution(instruction, sides[0], sides[1], result)


def _convolution(instruction: Instruction, left: Array, right: Array, result: Array) -> float:
    """TPU compilers write all products as convolutions: contracted axes are features or window places."""
    labels = LABELS.search(instruction.rest)
    if labels is None:
        return 0.0
    lhs, rhs, out = labels.groups()
    features = right.sizes[rhs.index("i")]
    total = 2.0 * features * result.sizes[out.index("b")] * result.sizes[out.index("f")]
    window = _window(instruction.rest)
    for axis in sorted(label for label in out if label.isdigit()):
        number = int(axis)
        sizes = (left.sizes[lhs.index(axis)], right.sizes[rhs.index(axis)], result.sizes[out.index(axis)])
        total *= _valid_places(*sizes, **{key: values[number] for key, values in window.items()})
    return total


def _window(rest: str) -> dict[str, list[int]]:
    """Low padding, stride and dilations of each window axis."""
    found = WINDOW.search(rest)
    fields = dict(field.split("=") for field in found.group(1).split()) if found else {}
    rank = len(fields.get("size", "1").split("x"))

    def of(name: str, default: str) -> list[int]:
        return [int(value.split("_")[0]) for value in fields.get(name, "x".join([default] * rank)).split("x")]

    return {
        "pad": of("pad", "0_0"), "stride": of("stride", "1"),
        "spread": of("lhs_dilate", "1"), "gap": of("rhs_dilate", "1"),
    }  # fmt: skip


def _valid_places(size: int, kernel: int, out: int, pad: int, stride: int, spread: int, gap: int) -> int:
    """Pairs of (output, window place) along one axis that meet an element, not padding or a hole of dilation."""
    if kernel == 1 and not pad:
        return out
    last = (size - 1) * spread
    count = 0
    for place in range(kernel):
        first = place * gap - pad
        # Of out positions first, first + stride, …: those in [0, last] that are multiples of the spread.
        count += sum(1 for i in range(out) if 0 <= first + i * stride <= last and not (first + i * stride) % spread)
    return count


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes read from and written to HBM: operands and results, of large arrays only the slices that are touched."""
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0.0
    if instruction.opcode in ("while", "conditional", "call") or NOTHING_MOVED.search(instruction.rest):
        return 0.0
    operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
    if instruction.opcode == "fusion":
        return _fusion_bytes(module.computations[instruction.called["calls"]], operands, instruction)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _bytes(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * _bytes(operands[1])
    return sum(map(_bytes, operands)) + _bytes(instruction)


def _fusion_bytes(inner: Computation, operands: list[Instruction], fusion: Instruction) -> float:
    total = 0.0
    updates = [i for i in inner.instructions if i.opcode == "dynamic-update-slice"]
    written_in_place = {i.operands[0] for i in updates}
    for parameter, operand in zip(inner.parameters, operands, strict=False):
        readers = inner.users.get(parameter.name, ())
        if readers and all(reader.opcode in ("dynamic-slice", "slice", "gather") for reader in readers):
            total += min(_bytes(operand), sum(_bytes(reader) for reader in readers))
        elif parameter.name not in written_in_place:
            total += _bytes(operand)
    in_place = [i for i in updates if i.operands[0] in {p.name for p in inner.parameters}]
    if not in_place:
        return total + _bytes(fusion)
    whole = sum(_bytes(i) for i in in_place)
    return total + max(0.0, _bytes(fusion) - whole) + 2.0 * sum(_bytes(inner.by_name[i.operands[1]]) for i in in_place)


def _bytes(instruction: Instruction) -> float:
    return sum(array.num_bytes for array in instruction.arrays if not array.on_chip)
