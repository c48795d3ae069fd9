# SPDX-License-Identifier: Apache-2.0
"""What a plan says: one dictionary (the JSON), and tables of it for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.config import Config
from llm_jepa_jax.plan.chips import GIB
from llm_jepa_jax.plan.memory import Memory
from llm_jepa_jax.plan.search import Candidate
from llm_jepa_jax.plan.shapes import Assumptions, describe
from llm_jepa_jax.plan.topology import Topology

KINDS = ("parameters", "frozen", "optimizer", "batch", "activations", "gradients", "temporaries")
SHOWN = 10
"""Candidates that are listed."""


def as_dict(
    candidate: Candidate,
    given: Config,
    shape: RowShape,
    topology: Topology,
    assumed: Assumptions,
    price: float,
    others: list[Candidate],
) -> dict[str, Any]:
    """Everything about the chosen candidate, numbers in plain units (seconds, bytes or GiB as named)."""
    timeline, memory, chip = candidate.timeline, candidate.memory, topology.chip
    tokens = candidate.config.data.rows_per_step * shape.width
    seconds = timeline.seconds
    needed = candidate.too_large.needed if candidate.too_large else memory.peak
    result: dict[str, Any] = {
        "fits": candidate.fits,
        "hbm_gib": round(needed / GIB, 3),
        "hbm_available_gib": round(chip.hbm / GIB, 3),
        "estimated_step_s": round(seconds, 4) if chip.peak and candidate.fits else None,
        "estimated_mfu": round(candidate.utilisation(shape, topology), 4) if chip.peak and candidate.fits else None,
        "override": override(candidate, given),
        "topology": topology.name,
        "chips": topology.num_chips,
        "devices": topology.num_devices,
        "mesh": dict(candidate.mesh.shape),
        "how": candidate.how,
        "compile_s": round(candidate.compile_seconds, 1),
        "assumptions": describe(candidate.config, shape, assumed),
        "hbm_by_kind_gib": {kind: round(getattr(memory, kind) / GIB, 3) for kind in KINDS},
        "flops_per_device": {"products": timeline.product_flops, "attention_kernels": timeline.kernel_flops},
        "hbm_bytes_per_device": timeline.hbm_bytes,
        "exchanges": _exchanges(candidate),
        "candidates": [_short(each, shape, topology) for each in others[:SHOWN]],
    }
    if result["estimated_step_s"]:
        result |= _speed(candidate, topology, assumed, tokens, price)
    if not candidate.fits:
        result["advice"] = advice(candidate, topology)
    return result


def _speed(
    candidate: Candidate, topology: Topology, assumed: Assumptions, tokens: float, price: float
) -> dict[str, Any]:
    timeline = candidate.timeline
    steps = assumed.epoch_tokens / tokens
    hours = steps * timeline.seconds / 3600 * topology.num_chips
    result = {
        "seconds": {
            "compute": timeline.compute, "attention_kernels": timeline.kernels,
            "exchanges_waited_for": timeline.exposed, "exchanges_hidden": timeline.hidden,
            "by_scope": dict(timeline.scopes),
        },
        "tokens_per_s": round(tokens / timeline.seconds, 1),
        "epoch_tokens": assumed.epoch_tokens,
        "steps_per_epoch": round(steps, 1),
        "chip_hours_per_epoch": round(hours, 2),
        "loops_counted_once": sorted(timeline.unknown_loops),
        "kernels_without_estimate": sorted(timeline.unpriced),
    }  # fmt: skip
    return result | ({"cost_per_epoch": round(hours * price, 2)} if price else {})


def _exchanges(candidate: Candidate) -> list[dict[str, Any]]:
    return [
        {
            "axes": list(axes), "links": links, "kind": kind, "count": traffic.count, "bytes": traffic.num_bytes,
            "seconds": traffic.seconds, "waited_for_s": traffic.exposed,
        }
        for (axes, links, kind), traffic in sorted(
            candidate.timeline.traffic.items(), key=lambda item: -item[1].seconds
        )
    ]  # fmt: skip


def _short(candidate: Candidate, shape: RowShape, topology: Topology) -> dict[str, Any]:
    needed = candidate.too_large.needed if candidate.too_large else candidate.memory.peak
    known = topology.chip.peak and not candidate.too_large
    return {
        "mesh": dict(candidate.mesh.shape),
        "micro_batches": candidate.config.train.micro_batches,
        "remat": candidate.config.train.remat,
        "head_chunk": candidate.config.objective.head_chunk,
        "how": candidate.how,
        "fits": candidate.fits,
        "hbm_gib": round(needed / GIB, 2),
        "estimated_step_s": round(candidate.timeline.seconds, 4) if known else None,
        "estimated_mfu": round(candidate.utilisation(shape, topology), 4) if known else None,
        "compile_s": round(candidate.compile_seconds, 1),
    }


def override(candidate: Candidate, given: Config) -> str:
    """The arguments that turn the given configuration into this candidate."""
    return " ".join(f"--config.{key}={value}" for key, value in candidate.changes(given).items())


def advice(candidate: Candidate, topology: Topology) -> str:
    """By how much a step does not fit, and what would help most."""
    memory, available = candidate.memory, topology.chip.hbm
    needed = candidate.too_large.needed if candidate.too_large else memory.peak
    largest = max(KINDS, key=lambda kind: getattr(memory, kind))
    remat = candidate.config.train.remat
    less = {"none": "train.remat=dots or hidden", "dots": "train.remat=hidden or full", "hidden": "train.remat=full"}
    helps = {
        "parameters": "more chips, or a larger mesh.fsdp or mesh.tensor",
        "frozen": "more chips, or a larger mesh.fsdp or mesh.tensor",
        "optimizer": "more chips, opt.second_moment=factored or opt.first_moment_dtype=bfloat16",
        "batch": "fewer data.rows_per_step",
        "activations": less.get(remat, "more train.micro_batches, a larger mesh.tensor or a shorter data.row_length"),
        "gradients": "a larger mesh.fsdp or mesh.tensor, or more chips",
        "temporaries": "a larger mesh.tensor, a smaller objective.head_chunk or a shorter data.row_length",
    }
    over = f"{(needed - available) / GIB:.1f} GiB too much" if needed > available else "more than there is"
    return f"{over} a device; most of it is {largest}: try {helps[largest]}"


def show(result: dict[str, Any], memory: Memory, console: Console) -> None:
    """The plan as tables."""
    title = f"{result['topology']}: {result['devices']} devices, mesh {result['mesh']}, {result['how']}"
    table = Table(title=title, title_justify="left")
    for column in ("HBM of a device", "GiB"):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for kind, size in result["hbm_by_kind_gib"].items():
        if size:
            table.add_row(kind, f"{size:.2f}")
    table.add_section()
    table.add_row("peak", f"{result['hbm_gib']:.2f}")
    if result["hbm_available_gib"]:
        table.add_row("available", f"{result['hbm_available_gib']:.2f}")
    console.print(table)
    if result["exchanges"]:
        console.print(_exchange_table(result))
    if len(result["candidates"]) > 1:
        console.print(_candidate_table(result))
    for line in result["assumptions"]:
        console.print(f"assumed: {line}", highlight=False)
    for line in _summary(result):
        console.print(line, highlight=False)


def _exchange_table(result: dict[str, Any]) -> Table:
    table = Table(title="Exchanges of a step and device", title_justify="left")
    for column in ("mesh axes", "links", "kind", "number", "GB", "ms", "ms waited for"):
        table.add_column(column, justify="left" if column in ("mesh axes", "links", "kind") else "right")
    for each in result["exchanges"]:
        table.add_row(
            "+".join(each["axes"]) or "none", each["links"], each["kind"], str(each["count"]),
            f"{each['bytes'] / 1e9:.2f}", f"{1e3 * each['seconds']:.1f}", f"{1e3 * each['waited_for_s']:.1f}",
        )  # fmt: skip
    return table


def _candidate_table(result: dict[str, Any]) -> Table:
    table = Table(title="Compared", title_justify="left")
    for column in ("mesh", "micro-batches", "remat", "head chunk", "how", "GiB", "fits", "s a step", "utilisation"):
        table.add_column(column)
    for each in result["candidates"]:
        seconds, share = each["estimated_step_s"], each["estimated_mfu"]
        table.add_row(
            " x ".join(str(size) for size in each["mesh"].values()), str(each["micro_batches"]), each["remat"],
            str(each["head_chunk"]), each["how"], f"{each['hbm_gib']:.1f}", "yes" if each["fits"] else "no",
            f"{seconds:.3f}" if seconds else "", f"{share:.1%}" if share else "",
        )  # fmt: skip
    return table


def _summary(result: dict[str, Any]) -> list[str]:
    lines = []
    if result["estimated_step_s"]:
        spent = result["seconds"]
        lines.append(
            f"estimate, not a measurement: {result['estimated_step_s']:.3f} s a step "
            f"({spent['compute']:.3f} computing, {spent['attention_kernels']:.3f} in attention kernels, "
            f"{spent['exchanges_waited_for']:.3f} waiting for links), "
            f"utilisation {result['estimated_mfu']:.1%} of the peak, {result['tokens_per_s']:,.0f} tokens/s"
        )
        cost = f", cost {result['cost_per_epoch']:,.2f}" if "cost_per_epoch" in result else ""
        lines.append(
            f"an epoch of {result['epoch_tokens']:.3g} tokens: {result['steps_per_epoch']:,.1f} steps, "
            f"{result['chip_hours_per_epoch']:,.2f} chip-hours{cost}"
        )
    if not result["fits"]:
        lines.append(f"does not fit: {result['advice']}")
    if result["override"]:
        lines.append(f"to run it so: {result['override']}")
    return lines
