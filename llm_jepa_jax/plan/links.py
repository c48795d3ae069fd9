# SPDX-License-Identifier: Apache-2.0
"""How long an exchange between devices takes: its bytes over the links that its groups can use."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jepa_jax.plan.topology import Topology
from llm_jepa_jax.plan.work import Collective

HOP = 1e-6
"""Seconds that a message takes to the next chip, whatever its size (jax-ml.github.io/scaling-book/tpus)."""
TIMES_SENT = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0}
"""How often a device sends, and receives, about the whole array in a ring: an all-reduce scatters, then gathers."""


@dataclasses.dataclass(frozen=True)
class Route:
    """What a group of devices communicates over."""

    axes: tuple[str, ...]
    """Mesh axes along which its members differ."""
    name: str
    """The links, such as `ICI 2 x ring of 4`, `ICI 4 in a row`, `DCN`."""
    size: int
    bandwidth: float
    """Bytes a second that a device receives over all usable links; 0: not known."""
    hops: float
    """Average distance of two members in links."""
    slices: int = 1
    """Slices or nodes that it spans; their share of the bytes goes over `dcn`."""
    dcn: float = 0.0
    longest: int = 1
    """Members of its longest ring or row."""


class Links:
    """The links of one topology, under one mesh."""

    def __init__(self, topology: Topology, axis_sizes: dict[str, int], places: Sequence[tuple[int, ...]]):
        """`places`: of each device, in the order of the mesh, its slice and its chip's coordinates."""
        self._topology, self._axis_sizes, self._places = topology, axis_sizes, places

    @functools.cache  # noqa: B019 -- lives as long as one report
    def route(self, group: tuple[int, ...]) -> Route:
        """What these devices (places in the mesh) communicate over."""
        chip = self._topology.chip
        coordinates = np.stack(np.unravel_index(np.asarray(group), tuple(self._axis_sizes.values())))
        axes = tuple(
            axis for axis, along in zip(self._axis_sizes, coordinates, strict=True) if len(set(along.tolist())) > 1
        )
        places = [self._places[index] for index in group]
        slices = len({place[0] for place in places})
        chips = {place[1:] for place in places if place[0] == places[0][0]}
        if not chip.torus:
            return self._node_route(axes, len(group), slices)
        extents = [len(set(column)) for column in zip(*chips, strict=True)]
        box = math.prod(extents) == len(chips)
        links, hops, names, longest = 0, 0.0, [], 1
        for dimension, extent in enumerate(extents):
            if extent == 1:
                continue
            ring = box and extent == self._topology.shape[dimension] and self._topology.wraps(dimension)
            links += 2 if ring else 1
            hops += extent / 4 if ring else extent / 3
            names.append(f"{'ring' if ring else 'row'} of {extent}")
            longest = max(longest, extent)
        # Devices of one chip share its links, unless they take part together.
        together = len(places) / (len(chips) * slices)
        share = together / chip.per_chip
        bandwidth = links * chip.link * share if links else 6 * chip.link  # dies of one chip: six links' worth
        inside = [] if len(chips) == 1 and slices > 1 else ["ICI " + (" x ".join(names) or "within a chip")]
        name = ", ".join(inside + [f"DCN of {slices} slices"] * (slices > 1))
        return Route(axes, name, len(group), bandwidth, hops, slices, chip.dcn, longest)

    def _node_route(self, axes: tuple[str, ...], size: int, nodes: int) -> Route:
        chip = self._topology.chip
        name = f"network of {nodes} nodes" if nodes > 1 else f"within a {'node' if chip.platform == 'gpu' else 'host'}"
        return Route(axes, name, size, chip.link, 1.0, nodes, chip.dcn, size)

    def seconds(self, collective: Collective) -> float:
        """Time of an exchange that has its links to itself; 0 where bandwidths are not known."""
        group = max(collective.groups, key=len)
        return exchange_seconds(self.route(group), collective.kind, collective.num_bytes)


def exchange_seconds(route: Route, kind: str, num_bytes: float) -> float:
    """As `Links.seconds`, over one route.

    Gathers and scatters use all links of the group's box of chips in both directions; exchanges of every member with
    every other cost the distance too. Between slices each device sends its own part of what its slice has gathered.
    """
    size, local = route.size, max(1, route.size // route.slices)
    if size == 1 or not route.bandwidth:
        return 0.0
    latency = HOP * route.longest
    if kind == "collective-permute":
        return num_bytes / (route.dcn if route.slices > 1 else route.bandwidth) + latency
    if kind == "all-to-all":
        inside = num_bytes * (local - 1) / local * max(1.0, route.hops) / route.bandwidth
        return inside + num_bytes * (route.slices - 1) / route.slices / route.dcn + latency
    times = TIMES_SENT[kind]
    inside = times * num_bytes * (local - 1) / local / route.bandwidth
    between = times * num_bytes / local * (route.slices - 1) / route.slices
    return inside + (between / route.dcn if between else 0.0) + times * latency


def mesh_links(topology: Topology, mesh: Any) -> Links:
    """The links under a mesh over the topology's devices."""
    if topology.chip.torus:
        places = [
            (getattr(device, "slice_index", None) or 0, *device.coords[: topology.chip.torus])
            for device in mesh.devices.flat
        ]
    else:
        places = [(index // topology.chip.node, index) for index in range(mesh.size)]
    return Links(topology, dict(mesh.shape), places)
