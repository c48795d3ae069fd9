# SPDX-License-Identifier: Apache-2.0
"""Compiles for TPUs on a machine without one; a process of its own, since its environment must be set before JAX."""

import json
import os
import sys

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5p-8",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax
import jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.config import freeze
from llm_jepa_jax.main import parse
from llm_jepa_jax.models.attention import splash
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.parallel.sharding import placed_batch
from llm_jepa_jax.resolve import attention_backend, resolve
from llm_jepa_jax.train.state import state_factory
from llm_jepa_jax.train.step import make_train_step

DEVICES = get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices


def step(arguments: list[str], longest_segment: int) -> tuple[str, str]:
    """The chosen back end, and the compiled program of a preset's training step."""
    config = freeze(parse(["main", *arguments]).config)
    mesh = make_mesh(config.mesh, DEVICES)
    config = resolve(config, mesh.shape)
    factory = state_factory(config, mesh, 10)
    shape = RowShape(config.data.row_length, config.data.row_length, 8, longest_segment)
    batch = placed_batch(mesh, config.data.rows_per_step, shape)
    with jax.set_mesh(mesh):
        compiled = make_train_step(factory, 10, longest_segment).lower(factory.abstract, batch).compile()
    return attention_backend(config, "tpu", config.data.row_length, mesh.shape["context"]), compiled.as_text()


def kernel(head_dim: int, dtype: str, length: int, window: int, soft_cap: float) -> tuple[str, str]:
    """The kernel alone, forward and backward, on one device."""
    sharding = jax.sharding.SingleDeviceSharding(DEVICES[0])
    query, key = (jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype, sharding=sharding) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=sharding)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        return splash.attend(query, key, value, segments, 0, window, soft_cap).astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    return "splash", gradients.lower(query, key, key, segments).compile().as_text()


if __name__ == "__main__":
    for case in sys.argv[1:]:
        kind, *values = json.loads(case)
        backend, program = {"step": step, "kernel": kernel}[kind](*values)
        names = [line for line in program.splitlines() if "tpu_custom_call" in line]
        print(json.dumps({"backend": backend, "kernels": sum("splash" in line for line in names), "all": len(names)}))
