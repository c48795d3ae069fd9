# SPDX-License-Identifier: Apache-2.0
"""The device mesh. Axis types are stated here and nowhere else."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "context", "tensor")
"""From the slowest links to the fastest: `slice` alone crosses the data-centre network, `tensor` is innermost."""
AXIS_TYPES = (AxisType.Auto,) * len(AXES)
KEYS = {"slice": "slices"} | {axis: axis for axis in AXES[1:]}
"""The key of section `mesh` that says an axis's size."""


def mesh_shape(config: MeshConfig, num_devices: int, told: int = 0) -> tuple[int, ...]:
    """Sizes of `AXES`; -1 fills with the devices left.

    `told` is how many slices the devices say they are; 0: they say nothing.

    Raises:
        UserError: a size is 0 or below -1, more than one axis fills, `mesh.slices` is not what the devices say, or the
            product is not the number of devices.
    """
    sizes = {axis: getattr(config, key) for axis, key in KEYS.items()}
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise UserError(f"config: `mesh.{KEYS[axis]}`={size}; use a positive number of devices, or -1 to fill")
    if told and sizes["slice"] not in (-1, told):
        raise UserError(
            f"config: `mesh.slices`={sizes['slice']}, but the devices are those of {told} slices; leave it out"
        )
    sizes["slice"] = max(1, told) if sizes["slice"] == -1 else sizes["slice"]
    filling = [axis for axis, size in sizes.items() if size == -1]
    if len(filling) > 1:
        raise UserError(f"config: `mesh.{filling[0]}` and `mesh.{filling[1]}` are both -1; only one axis can fill")
    taken = 1
    for axis, size in sizes.items():
        if size == -1:
            continue
        if num_devices % (taken * size):
            left = num_devices // taken
            divisors = ", ".join(str(d) for d in range(1, left + 1) if left % d == 0)
            raise UserError(
                f"config: `mesh.{KEYS[axis]}`={size} does not divide {left} devices; use {divisors}, or -1 to fill"
            )
        taken *= size
    if filling:
        sizes[filling[0]] = num_devices // taken
    elif taken != num_devices:
        raise UserError(
            f"config: `mesh.data`={sizes['data']} leaves {num_devices - taken} of {num_devices} devices idle; "
            f"use {num_devices * sizes['data'] // taken}, or -1 to fill"
        )
    return tuple(sizes.values())


def slices_told(devices: Sequence[jax.Device]) -> int:
    """How many slices these devices say they are; 0: they are none of a TPU's, and say nothing."""
    if devices[0].platform != "tpu":
        return 0
    return len({_slice(device) for device in devices})


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of them by default).

    Axes behind `slice` stay inside a slice: there each slice's devices are laid on its torus so that the last axes take
    the fastest links. Devices that do not say their slice are cut into equal runs of their order, which is by process.
    """
    devices = jax.devices() if devices is None else devices
    told = slices_told(devices)
    slices, *inside = mesh_shape(config, len(devices), told)
    if told:
        groups = [[each for each in devices if _slice(each) == number] for number in sorted({*map(_slice, devices)})]
    else:
        groups = [list(part) for part in np.asarray(devices).reshape(slices, -1)]
    laid = [mesh_utils.create_device_mesh(inside, group) for group in groups]
    return Mesh(np.stack(laid), AXES, axis_types=AXIS_TYPES)
