# SPDX-License-Identifier: Apache-2.0
"""How many sequences go through the model together: what the memory of the devices holds, and less where it did not."""

import logging
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.parallel.sharding import num_row_shards

LOG = logging.getLogger("llm_jepa_jax")
DEVICE_SHARE, HOST_SHARE = 0.8, 0.4
"""Of the memory that is free, what a batch may take: a device's own, or the host's, which others use too."""
MOST_ROWS, MOST_CPU_ROWS = 512, 32
"""For each row shard; larger batches wait longer for their longest answer, and on CPUs gain no speed."""


def forward_bytes(model: ModelConfig, tensor: int, tokens: int, slots: int, dtype: Any) -> float:
    """About what a sequence of so many tokens takes on a device while a layer and the head run, in bytes.

    `slots` is how many of its tokens have logits at one time, `tensor` into how many parts heads, MLP and vocabulary
    are cut. Checked against compiled programs in `tests/test_batching.py`.
    """
    width = jnp.dtype(dtype).itemsize
    heads = (3 * model.num_heads + 4 * model.num_kv_heads) * model.head_dim / tensor
    layer = tokens * (width * (heads + 3 * model.mlp_dim / tensor) + (2 * width + 8) * model.embed_dim)
    return layer + slots * 4 * 3 * model.padded_vocab_size / tensor


def cache_bytes(model: ModelConfig, tensor: int, slots: int, dtype: Any) -> float:
    """Keys and values of a sequence of so many slots on a device, in bytes."""
    heads = sum(model.layer_kv_heads) or model.num_kv_heads * model.num_layers
    return 2 * heads * model.head_dim * slots * jnp.dtype(dtype).itemsize / tensor


def weight_bytes(params: Any, mesh: Mesh, dtype: Any) -> float:
    """What a device may hold of the parameters beside what it stores, in bytes: the head as its product reads it, and a
    copy of everything where the compute type is another one, or where parts of others are gathered.
    """
    leaves, width = jax.tree.leaves(params), jnp.dtype(dtype).itemsize
    embedding = params["embedding"]
    held = float(embedding.size * embedding.dtype.itemsize)
    if any(leaf.dtype != jnp.dtype(dtype) for leaf in leaves):
        held += embedding.size * width + sum(leaf.size for leaf in leaves) * width
    elif mesh.shape["fsdp"] * mesh.shape["context"] > 1:
        held += sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return held / mesh.shape["tensor"]


def free_bytes(mesh: Mesh) -> float:
    """What a batch may take of each device's memory: a share of what is free on the fullest one, in bytes.

    Accelerators say what they hold. CPUs share what the machine, or its control group, has left.
    """
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    told = [device.memory_stats() for device in local]
    if all(stats and stats.get("bytes_limit") for stats in told):
        free = DEVICE_SHARE * min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in told)
    else:
        free = HOST_SHARE * _host_bytes() / max(1, len(local))
    if jax.process_count() > 1:  # all have to choose the same
        free = float(np.min(multihost_utils.process_allgather(np.float64(free))))
    return free


def _host_bytes() -> float:
    """Memory of this machine that is free, in bytes."""
    meminfo = pathlib.Path("/proc/meminfo")
    if not meminfo.exists():
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = 1024.0 * int(lines["MemAvailable"].split()[0])
    group = pathlib.Path("/sys/fs/cgroup")
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return max(0.0, free)


def fitting_rows(row_bytes: float, free: float, wanted: int, mesh: Mesh) -> int:
    """How many rows to take of so many wanted: for each row shard a power of two, at least 1 and at most `MOST_ROWS`
    (`MOST_CPU_ROWS`), whose bytes are free, and no larger than needed.
    """
    shards = num_row_shards(mesh)
    most = MOST_CPU_ROWS if mesh.devices.flat[0].platform == "cpu" else MOST_ROWS
    fits = max(1, min(most, int(free // max(row_bytes, 1.0))))
    return shards * min(2 ** (fits.bit_length() - 1), 2 ** math.ceil(math.log2(max(1, -(-wanted // shards)))))


def in_batches(
    order: Sequence[int],
    rows_for: Callable[[int, int], int],
    run: Callable[[Sequence[int], int], None],
    shards: int,
    progress: Callable[[int], None],
) -> None:
    """Runs all of `order`, from its end on: `run(some of it, number of rows)`.

    `rows_for(last, left)` says how many rows a batch has whose largest is `last` of so many left; a multiple of
    `shards`. Where memory does not hold them, half as many are tried from there on, and it is said.

    Raises:
        UserError: not even one row a shard fits.
    """
    left, most = list(order), 0
    while left:
        rows = rows_for(left[-1], len(left))
        rows = min(rows, most) if most else rows
        if len(left) == len(order):
            LOG.info("%d sequences go through the model, %d at a time", len(left), rows)
        try:
            run(left[-rows:], rows)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if rows == shards or jax.process_count() > 1:  # processes that did fit would wait for the others
                raise UserError(
                    f"{rows} sequences together do not fit the devices' memory; set a smaller `eval.batch_size` or "
                    "`eval.max_new_tokens`, or shard the model over `mesh.fsdp` or `mesh.tensor`"
                ) from error
            most = shards * max(1, rows // shards // 2)
            LOG.warning("%d sequences together do not fit the devices' memory; %d at a time from here on", rows, most)
            continue
        del left[-rows:]
        progress(len(order) - len(left))
