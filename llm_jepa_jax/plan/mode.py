# SPDX-License-Identifier: Apache-2.0
"""`--mode=plan`: a configuration, compiled for a topology that is not there."""

import dataclasses
import json
import pathlib
from typing import Any

import ml_collections
from absl import flags
from rich.console import Console

from llm_jepa_jax.config import Config, freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.plan import shardings
from llm_jepa_jax.plan.chips import GIB
from llm_jepa_jax.plan.picture import draw
from llm_jepa_jax.plan.report import KINDS, as_dict, show
from llm_jepa_jax.plan.search import Candidate, by_arithmetic, by_compiler, candidates, search
from llm_jepa_jax.plan.shapes import Assumptions, step_shape
from llm_jepa_jax.plan.topology import (
    Topology,
    compile_devices,
    parse_topology,
    plan_mesh,
    prepare_environment,
)
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.vocabulary import padded, padding_line, with_vocabulary


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """What the command line says beside the configuration."""

    topology: str
    search: bool = True
    """Choose mesh, micro-batches, remat and head chunk; else plan the configuration as it is."""
    compiles: int = 2
    """Programs that the search compiles until they fit."""
    chip_hour_price: float = 0.0
    """0: costs are chip-hours."""
    assumed: Assumptions = Assumptions()
    verbose: bool = False
    """Show where every array of the state lies."""


def plan(values: ml_collections.ConfigDict, workdir: pathlib.Path, asked: PlanFlags) -> dict[str, Any]:
    """Plans, prints tables, and writes `plan.json` and `plan.png` into `workdir`.

    Raises:
        UserError: an unknown topology, a missing compiler, or a configuration that the topology cannot run.
    """
    if not asked.topology:
        raise UserError("--mode=plan: no topology; pass --topology, such as v5p:4x4x4, v6e:16x16, cpu:8 or gpu:h100x64")
    topology = parse_topology(asked.topology)
    prepare_environment(topology)
    config = _with_vocabulary(freeze(values))
    shape = step_shape(config, asked.assumed)
    chosen, compared = _candidates(config, shape, topology, asked)
    if chosen.failed:
        raise UserError(
            f"--topology={topology.name}: the compiler itself failed on mesh {dict(chosen.mesh.shape)}, "
            f"{chosen.failed}; plan another mesh"
        )
    result = as_dict(chosen, config, shape, topology, asked.assumed, asked.chip_hour_price, compared)
    console = Console()
    show(result, chosen.memory, console)
    placed = shardings.shardings(chosen.config, chosen.mesh)
    if asked.verbose:
        shardings.show(placed, console)
    result["warnings"] = shardings.warnings(placed, chosen.mesh)
    for line in filter(None, [padding_line(chosen.config.model), *result["warnings"]]):
        console.print(line, highlight=False)
    workdir.mkdir(parents=True, exist_ok=True)
    result["picture"] = str(workdir / "plan.png")
    draw(result, [(_name(each), _gib(each)) for each in compared], workdir / "plan.png")
    written = result | {"shardings": [dataclasses.asdict(each) for each in placed]}
    (workdir / "plan.json").write_text(json.dumps(written, indent=1) + "\n")
    return result


def plan_from_flags(values: flags.FlagValues, workdir: pathlib.Path) -> dict[str, Any]:
    """`plan` as the command line asks for it."""
    assumed = Assumptions(values.examples_per_row, values.longest_segment, values.epoch_tokens)
    asked = PlanFlags(values.topology, values.search, values.compiles, values.chip_hour_price, assumed, values.verbose)
    return plan(values.config, workdir, asked)


def _candidates(config: Config, shape: Any, topology: Topology, asked: PlanFlags) -> tuple[Candidate, list[Candidate]]:
    """The one to report, and all to compare it with."""
    compiler = topology.chip.platform in ("tpu", "cpu")
    devices = compile_devices(topology)
    if not asked.search or not topology.chip.peak:  # without a peak nothing is faster than anything else
        mesh = plan_mesh(config.mesh, topology, devices)
        config = dataclasses.replace(config, model=padded(config.model, mesh.shape["tensor"]))
        only = by_arithmetic(resolve(config, mesh.shape), shape, topology, mesh)
        only = by_compiler(only, shape, topology) if compiler else only
        return only, [only]
    if compiler:
        done, ranked = search(config, shape, topology, devices, asked.compiles)
        if done:
            return done[0], done + [each for each in ranked if not _compiled_already(each, done)]
    else:
        ranked = candidates(config, shape, topology, devices)
    if not ranked:
        raise UserError(
            f"--topology={topology.name}: no mesh of its devices divides data.rows_per_step={config.data.rows_per_step}"
        )
    return ranked[0], ranked


def _compiled_already(candidate: Candidate, done: list[Candidate]) -> bool:
    return any(each.config == candidate.config for each in done)


def _with_vocabulary(config: Config) -> Config:
    """The vocabulary where the configuration leaves it to the tokenizer."""
    return with_vocabulary(config, config.text.vocab_size if not config.model.vocab_size else 0, 1)


def _name(candidate: Candidate) -> str:
    sizes = "x".join(str(size) for size in candidate.mesh.shape.values())
    return f"{sizes}, {candidate.config.train.micro_batches} parts, {candidate.config.train.remat}, {candidate.how}"


def _gib(candidate: Candidate) -> dict[str, float]:
    return {kind: getattr(candidate.memory, kind) / GIB for kind in KINDS}
