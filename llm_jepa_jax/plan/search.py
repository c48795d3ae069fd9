# SPDX-License-Identifier: Apache-2.0
"""Which mesh, micro-batches, remat and chunk of the head are fastest: by arithmetic, then the best of them compiled."""

import dataclasses
import itertools
import logging
from typing import Any

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.config import Config
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.flops import model_flops
from llm_jepa_jax.parallel.sharding import num_row_shards
from llm_jepa_jax.plan.apart import Died, apart
from llm_jepa_jax.plan.arithmetic import memory_of, timeline_of
from llm_jepa_jax.plan.compiled import NUM_STEPS, Compiled, TooLarge, compile_step, gib
from llm_jepa_jax.plan.links import mesh_links
from llm_jepa_jax.plan.memory import Memory
from llm_jepa_jax.plan.schedule import Timeline
from llm_jepa_jax.plan.topology import Topology, compile_devices, plan_mesh, prepare_environment
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.train.state import state_factory

LOG = logging.getLogger("llm_jepa_jax")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Sizes of the fsdp axis that are tried."""
TENSOR_SIZES = (1, 2, 4, 8, 16)
CONTEXT_SIZES = (2, 4, 8, 16)
"""Parts of a row that are tried where whole ones do not fit."""
CHUNKS = (256, 2048, 8192)
"""Targets of a chunk of the head: where units are fast, small ones spend their time on the head's gradient."""
CLOSE = 1.1
"""A memory estimate by arithmetic may be this much above what there is and the step still be compiled."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the configuration."""

    config: Config
    mesh: Any
    memory: Memory
    timeline: Timeline
    how: str = "arithmetic"
    """`arithmetic`, `compiled` or `compiler failed`."""
    compile_seconds: float = 0.0
    too_large: TooLarge | None = None
    failed: str = ""
    """How the compiler itself failed."""

    @property
    def fits(self) -> bool:
        return self.too_large is None and not self.failed and self.memory.fits

    def utilisation(self, shape: RowShape, topology: Topology) -> float:
        """Share of the devices' peak that the model's own FLOPs take, no recomputation counted; 0: peak not known."""
        config, peak = self.config, topology.chip.peak * topology.num_devices
        tokens = config.data.rows_per_step * shape.width
        targets = config.data.rows_per_step * shape.target_slots
        length = min(shape.longest_segment, config.model.window or shape.length)
        flops = model_flops(config.model, tokens, targets, length, frozen=config.lora.rank > 0)
        return flops / (self.timeline.seconds * peak) if peak and self.timeline.seconds else 0.0

    def changes(self, given: Config) -> dict[str, Any]:
        """The keys that differ from a configuration, with their values here."""
        return {key: get(self.config) for key, get in KEYS.items() if get(self.config) != get(given)}


KEYS = {
    "mesh.data": lambda config: config.mesh.data,
    "mesh.fsdp": lambda config: config.mesh.fsdp,
    "mesh.context": lambda config: config.mesh.context,
    "mesh.tensor": lambda config: config.mesh.tensor,
    "train.micro_batches": lambda config: config.train.micro_batches,
    "train.remat": lambda config: config.train.remat,
    "objective.head_chunk": lambda config: config.objective.head_chunk,
}
"""What the search chooses."""


def by_arithmetic(config: Config, shape: RowShape, topology: Topology, mesh: Any, state: Any = None) -> Candidate:
    """A candidate without compilation."""
    state = state or state_factory(config, mesh, NUM_STEPS).abstract
    sizes = dict(mesh.shape)
    memory = memory_of(config, shape, state, sizes, topology.chip)
    return Candidate(config, mesh, memory, timeline_of(config, shape, topology, mesh_links(topology, mesh), sizes))


def by_compiler(candidate: Candidate, shape: RowShape, topology: Topology) -> Candidate:
    """The same with what the compiler says. That for TPUs may end its process, so it has one of its own."""
    try:
        if topology.chip.platform == "tpu":
            result = apart(_compile, candidate.config, shape, topology)
        else:
            result = compile_step(candidate.config, shape, candidate.mesh, topology)
    except Died as error:
        return dataclasses.replace(candidate, how="compiler failed", failed=str(error))
    if isinstance(result, TooLarge):
        return dataclasses.replace(candidate, how="compiled", too_large=result, compile_seconds=result.seconds)
    return dataclasses.replace(
        candidate, how="compiled", memory=result.memory, timeline=result.timeline, compile_seconds=result.seconds
    )


def _compile(config: Config, shape: RowShape, topology: Topology) -> Compiled | TooLarge:
    """In another process, which has no devices yet."""
    prepare_environment(topology)
    return compile_step(config, shape, plan_mesh(config.mesh, topology, compile_devices(topology)), topology)


def candidates(config: Config, shape: RowShape, topology: Topology, devices: Any) -> list[Candidate]:
    """All ways to run the configuration that its checks allow, by arithmetic: the fastest that fits first.

    Rows are cut as `mesh.context` says, and otherwise too where nothing fits so. Only there, for arithmetic is too
    hopeful of it: `llama70b` on `v5p:4x8x8` with rows in four parts compiled to 1.34 times the time.
    """
    found = _with_context(config, config.mesh.context, shape, topology, devices)
    if not any(each.fits for each in found):
        for context in sorted(set(CONTEXT_SIZES) - {config.mesh.context}):
            found += _with_context(config, context, shape, topology, devices)
    return sorted(found, key=_order)


def _with_context(config: Config, context: int, shape: RowShape, topology: Topology, devices: Any) -> list[Candidate]:
    """The candidates whose rows are cut into so many parts."""
    found: list[Candidate] = []
    fixed = (topology.told or max(1, config.mesh.slices)) * max(1, context)
    for fsdp, tensor in itertools.product(SIZES, TENSOR_SIZES):
        taken = fsdp * tensor * fixed
        if topology.num_devices % taken:
            continue
        data = topology.num_devices // taken
        wanted = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, context=context, tensor=tensor)
        try:
            mesh = plan_mesh(wanted, topology, devices)
        except UserError:  # not a shape of this torus
            continue
        found += _on_mesh(dataclasses.replace(config, mesh=wanted), shape, topology, mesh)
    return found


def _order(candidate: Candidate) -> tuple[bool, float]:
    """What fits by its time, behind it what does not by its memory: the nearest to fitting first."""
    seconds = candidate.timeline.seconds if candidate.fits else 0.0
    return not candidate.fits, seconds or candidate.memory.peak


def _on_mesh(config: Config, shape: RowShape, topology: Topology, mesh: Any) -> list[Candidate]:
    """The candidates of one mesh."""
    found, state = [], None
    rows = config.data.rows_per_step // num_row_shards(mesh)
    parts = [part for part in (1, 2, 4, 8, 16, 32) if rows and rows % part == 0]
    chunks = sorted({config.objective.head_chunk, *CHUNKS}) if topology.chip.peak else [config.objective.head_chunk]
    for part, remat, chunk in itertools.product(parts, ("none", "dots", "hidden", "full"), chunks):
        changed = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, micro_batches=part, remat=remat),
            objective=dataclasses.replace(config.objective, head_chunk=chunk),
        )
        try:
            resolve(changed, mesh.shape)
        except UserError:
            continue
        state = state or state_factory(changed, mesh, NUM_STEPS).abstract
        found.append(by_arithmetic(changed, shape, topology, mesh, state))
    return found


def search(
    config: Config, shape: RowShape, topology: Topology, devices: Any, compiles: int
) -> tuple[list[Candidate], list[Candidate]]:
    """What was compiled, best first, and all candidates by arithmetic.

    Programs are compiled in the order of their estimated time, until `compiles` of them fit; after one that does not,
    only those that are estimated to take less memory.
    """
    ranked = candidates(config, shape, topology, devices)
    if not ranked:
        raise UserError(
            f"--topology={topology.name}: no mesh of {topology.num_devices} devices divides this configuration; "
            f"set data.rows_per_step to a multiple of {topology.num_devices}"
        )
    done: list[Candidate] = []
    limit, tried = CLOSE * topology.chip.hbm if topology.chip.hbm else float("inf"), set()
    for each in ranked:
        if sum(one.fits for one in done) >= compiles or len(done) >= 3 * compiles:
            break
        key = (tuple(each.mesh.shape.values()), each.config.train.micro_batches, each.config.train.remat)
        if each.memory.peak > limit or key in tried:
            continue
        tried.add(key)
        LOG.info("compiling mesh %s, %s", dict(each.mesh.shape), _words(each.config))
        result = by_compiler(each, shape, topology)
        done.append(result)
        if result.failed:
            LOG.warning("the compiler failed on it: %s", result.failed)
        elif not result.fits:
            limit = each.memory.peak * 0.95
            LOG.info("does not fit (%.0f s)", result.compile_seconds)
        else:
            LOG.info(
                "fits in %s, estimated %.3f s a step (compiled in %.0f s)",
                gib(result.memory.peak),
                result.timeline.seconds,
                result.compile_seconds,
            )
    return sorted(done, key=_order), ranked


def _words(config: Config) -> str:
    return (
        f"{config.train.micro_batches} micro-batches, remat {config.train.remat}, "
        f"head in chunks of {config.objective.head_chunk}"
    )
