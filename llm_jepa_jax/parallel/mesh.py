# SPDX-License-Identifier: Apache-2.0
"""The device mesh. Axis types are stated here and nowhere else."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from llm_jepa_jax.config import MeshConfig
from llm_jepa_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor); -1 fills with the devices left.

    Raises:
        UserError: a size is 0 or below -1, more than one axis fills, or the product is not the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise UserError(f"config: `mesh.{axis}`={size}; use a positive number of devices, or -1 to fill")
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
                f"config: `mesh.{axis}`={size} does not divide {left} devices; use {divisors}, or -1 to fill"
            )
        taken *= size
    if filling:
        sizes[filling[0]] = num_devices // taken
    elif taken != num_devices:
        raise UserError(
            f"config: `mesh.data`={sizes['data']} leaves {num_devices - taken} of {num_devices} devices idle; "
            f"use {num_devices * sizes['data'] // taken}, or -1 to fill"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of them by default), tensor axis innermost so that it takes the fastest links."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    if devices[0].platform == "cpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
