# SPDX-License-Identifier: Apache-2.0
"""The very training step, compiled ahead of time for a topology, and what its program says."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jepa_jax.batch import Batch, RowShape
from llm_jepa_jax.config import Config
from llm_jepa_jax.parallel.sharding import placed_batch
from llm_jepa_jax.plan import hlo
from llm_jepa_jax.plan.arithmetic import sizes_of
from llm_jepa_jax.plan.chips import GIB
from llm_jepa_jax.plan.hlo import Instruction
from llm_jepa_jax.plan.links import mesh_links
from llm_jepa_jax.plan.memory import Memory, compiled_memory
from llm_jepa_jax.plan.schedule import Timeline, Walk
from llm_jepa_jax.plan.topology import Topology
from llm_jepa_jax.train.state import StateFactory, state_factory
from llm_jepa_jax.train.step import make_train_step

NUM_STEPS = 1000
"""Of the learning-rate schedule: a constant of the program that changes nothing else."""
TOO_LARGE = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm|\(([\d.]+)([KMG])\) exceeds available HBM")
UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compiled step."""

    memory: Memory
    timeline: Timeline
    seconds: float
    """Of compilation."""


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """The compiler found no way to fit the step."""

    needed: float
    """Bytes on one device; 0: it did not say."""
    available: float
    seconds: float


def compile_step(config: Config, shape: RowShape, mesh: Mesh, topology: Topology) -> Compiled | TooLarge:
    """Compiles the step for the devices of a mesh and reads the result."""
    start = time.monotonic()
    factory = state_factory(config, mesh, NUM_STEPS)
    batch = placed_batch(mesh, config.data.rows_per_step, shape)
    try:
        with jax.set_mesh(mesh):
            step: Any = make_train_step(factory, NUM_STEPS, shape.longest_segment)
            compiled = step.lower(factory.abstract, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(bytes_needed(str(error)), topology.chip.hbm, time.monotonic() - start)
    seconds = time.monotonic() - start
    return read(compiled, config, shape, factory, batch, topology, seconds)


def read(
    compiled: Any,
    config: Config,
    shape: RowShape,
    factory: StateFactory,
    batch: Batch,
    topology: Topology,
    seconds: float,
) -> Compiled:
    """Memory and time of a compiled step."""
    mesh = factory.mesh
    module = hlo.parse(compiled.as_text())
    memory = compiled_memory(compiled, module, factory.abstract, batch, topology.chip.hbm)
    links = mesh_links(topology, mesh)
    reach = min(shape.longest_segment, config.model.window or shape.length)
    timeline = Walk(module, topology.chip, links, mesh.size, reach, _chunks(config, shape, mesh)).run()
    return Compiled(memory, timeline, seconds)


def _chunks(config: Config, shape: RowShape, mesh: Mesh) -> Any:
    """How often the head's loop runs: it visits chunks that hold targets, and all slots are assumed to."""
    targets = sizes_of(config, shape, dict(mesh.shape)).targets

    def trips(loop: Instruction) -> int | None:
        if "ntp_loss" not in loop.op_name:
            return None
        return max(1, math.ceil(targets / config.objective.head_chunk))

    return trips


def bytes_needed(message: str) -> float:
    """What a program would take, by the compiler's words when it does not fit; 0: it does not say."""
    found = TOO_LARGE.search(message)
    if not found:
        return 0.0
    number, unit = (found.group(1), found.group(2)) if found.group(1) else (found.group(5), found.group(6))
    return float(number) * UNITS[unit]


def gib(num_bytes: float) -> str:
    """In words."""
    return f"{num_bytes / GIB:.2f} GiB"
