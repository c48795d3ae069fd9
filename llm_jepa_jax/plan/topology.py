# SPDX-License-Identifier: Apache-2.0
"""Topologies by name: `v5p:4x4x4`, `v6e:16x16`, `tpu7x:4x4x8`, `v5p:4x4x4*2` (two slices), `cpu:8`, `gpu:h100x64`."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.parallel.mesh import AXES, AXIS_TYPES, make_mesh, mesh_shape
from llm_jepa_jax.plan.chips import CHIPS, Chip

FORMS = "v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x8, v5p:4x4x4*2 (two slices), cpu:8 or gpu:h100x64"
MOST_SLICES = 256
"""More than any job has had; the compiler would describe as many devices."""
SHAPE = re.compile(r"\d+(x\d+)*")
USUAL = {
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
}
"""Shapes that can be rented, by dimensions of the torus."""
ENVIRONMENT = {
    # The compiler looks for TPU metadata and other processes' locks; there is no TPU here to share or to ask.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are linked."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of a slice's torus; their number alone where there is none."""
    slices: int = 1
    """Slices of this shape, with the data-centre network in between."""

    @property
    def num_devices(self) -> int:
        """Devices of all slices, as JAX counts them."""
        return self.num_chips * self.chip.per_chip

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def told(self) -> int:
        """How many slices its devices say they are (`parallel.mesh.mesh_shape`)."""
        return self.slices if self.chip.platform == "tpu" else 0

    def wraps(self, dimension: int) -> bool:
        """Whether the ends of a dimension are linked: whole cubes of 4 (3-D), or 16 chips in a row (2-D)."""
        if self.chip.torus == 3:
            return all(size % 4 == 0 for size in self.shape) and self.shape[dimension] >= 4
        return self.chip.torus == 2 and self.shape[dimension] == 16


def parse_topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
        UserError: the name says none, with the names there are.
    """
    kind, _, rest = name.strip().partition(":")
    if kind == "gpu":
        return _gpus(name, rest)
    if kind == "cpu":
        if not rest.isdigit() or not int(rest):
            raise UserError(f"--topology={name}: cpu:N takes a number of simulated devices, such as cpu:8")
        return Topology(name, CHIPS["cpu"], (int(rest),))
    tpus = {key: chip for key, chip in CHIPS.items() if chip.platform == "tpu"}
    if kind not in tpus:
        old = re.fullmatch(r"(v4|v5e|v5p|v6e|tpu7x)-(\d+)", name)
        hint = f"; a slice is named by its shape, such as {old[1]}:{USUAL[tpus[old[1]].torus][4]}" if old else ""
        raise UserError(f"--topology={name}: no such topology{hint}; use {FORMS}")
    return _slice(name, tpus[kind], rest)


def _slice(name: str, chip: Chip, rest: str) -> Topology:
    usual = ", ".join(f"{chip.name}:{shape}" for shape in USUAL[chip.torus])
    rest, star, count = rest.partition("*")
    if star and not (count.isdigit() and 2 <= int(count) <= MOST_SLICES):
        raise UserError(
            f"--topology={name}: `*{count}` is no number of slices; use 2 to {MOST_SLICES}, as in {chip.name}:{rest}*2"
        )
    if not SHAPE.fullmatch(rest):
        raise UserError(f"--topology={name}: `{rest}` is no shape; use one such as {usual}")
    shape = tuple(int(size) for size in rest.split("x"))
    if len(shape) != chip.torus:
        raise UserError(f"--topology={name}: {chip.name} slices have {chip.torus} dimensions; use one such as {usual}")
    if shape[0] % 2 or shape[1] % 2 or not all(shape):
        raise UserError(f"--topology={name}: hosts are 2x2 chips, so the first two sizes are even; use {usual}")
    if math.prod(shape) > chip.largest:
        raise UserError(f"--topology={name}: the largest {chip.name} slice has {chip.largest} chips; use {usual}")
    return Topology(name, chip, shape, int(count) if star else 1)


def _gpus(name: str, rest: str) -> Topology:
    gpus = [key for key, chip in CHIPS.items() if chip.platform == "gpu"]
    kind, _, count = rest.rpartition("x")
    if kind not in gpus or not count.isdigit() or not int(count):
        raise UserError(f"--topology={name}: use gpu:KINDxN with KIND one of {', '.join(gpus)}, such as gpu:h100x64")
    chip = CHIPS[kind]
    if int(count) > chip.node and int(count) % chip.node:
        raise UserError(f"--topology={name}: nodes have {chip.node} devices; use a multiple of {chip.node}")
    return Topology(name, chip, (int(count),))


def prepare_environment(topology: Topology) -> None:
    """What must be set before JAX starts its back end: no TPU is looked for, and as many CPU devices as are planned.

    Raises:
        UserError: the TPU compiler is not installed.
    """
    if topology.chip.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology={topology.name}: planning for TPUs compiles with libtpu, which is not installed; "
                "run `pip install 'llm_jepa_jax[plan]'`"
            )
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")  # abstract values only: no accelerator is taken
    if topology.chip.platform == "cpu":
        with contextlib.suppress(RuntimeError):  # JAX has started, with the devices it has
            jax.config.update("jax_num_cpu_devices", topology.num_devices)


def compile_devices(topology: Topology) -> Sequence[Any]:
    """The devices that a program is compiled for: described ones for TPUs, simulated ones for CPUs, none for GPUs.

    Raises:
        UserError: the compiler refuses the topology, or the process has fewer simulated devices.
    """
    chip = topology.chip
    if chip.platform == "gpu":
        return ()
    if chip.platform == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.num_devices:
            raise UserError(
                f"--topology={topology.name}: this process has {len(devices)} CPU devices; start a process of its own"
            )
        return devices[: topology.num_devices]
    from jax.experimental.topologies import get_topology_desc

    try:
        description = get_topology_desc(
            platform=chip.platform,
            topology_name=topology.name.partition("*")[0],
            num_slices=topology.slices,
            **dict(chip.options),
        )
    except Exception as error:  # the plugin's own error type is private
        raise UserError(f"--topology={topology.name}: the TPU compiler refuses it: {_first_line(error)}") from error
    return description.devices


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def plan_mesh(config: MeshConfig, topology: Topology, devices: Sequence[Any]) -> Any:
    """The mesh over a topology's devices; where nothing is compiled, its sizes and names alone.

    Raises:
        UserError: its axes do not multiply to the devices, or cannot be laid on the torus.
    """
    if topology.chip.platform == "gpu":
        sizes = mesh_shape(config, topology.num_devices)
        return AbstractMesh(sizes, AXES, axis_types=AXIS_TYPES)
    try:
        return make_mesh(config, devices)
    except (NotImplementedError, ValueError) as error:
        words = " x ".join(str(size) for size in mesh_shape(config, topology.num_devices, topology.told))
        raise UserError(
            f"--topology={topology.name}: a mesh of {words} devices cannot be laid on its torus; make each axis a "
            f"product of some of its sizes {topology.shape}"
        ) from error
