# SPDX-License-Identifier: Apache-2.0
"""XLA's options for the training step, by kind of device, as data. `train.compiler_options=none` leaves them all out.

What each does was seen in programs compiled ahead of time (libtpu 0.0.42; docs/planning.md has the numbers) or is what
the compilers' own users publish: MaxText's `xla_flags_library.py` for TPUs, JAX's GPU performance guide for GPUs.
"""

from typing import Any

from jax.sharding import Mesh

from llm_jepa_jax.config import Config

Options = dict[str, bool | int | str]

ASYNCHRONOUS: Options = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
"""Gathers go on while products run."""
SCATTERED: Options = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
    "xla_tpu_assign_all_reduce_scatter_layout": True,
}
"""Sums of gradients of which a device keeps a part are scattered, not reduced whole."""
WHOLE_PRODUCTS: Options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
"""A product waits for its gathered weights. By itself, XLA's partitioner cuts products with large gathered weights into
loops that add up a window at a time: layers of `llama8b` took twice as long."""
ON_SPARSE_CORES: Options = {
    "xla_sc_disable_megacore_partitioning": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": True,
    "xla_tpu_sparse_core_all_reduce_offload_min_size_in_bytes": 0,
    "xla_tpu_use_tc_device_shape_on_sc": True,
}
"""The SparseCores sum gradients while products run, over all chips of a slice too, where the core itself makes an
all-reduce of whole gradients and waits. Published recipes for TPU7x and v5p set most of them for their chips."""
LARGER_BLOCKS: Options = {"xla_tpu_scoped_vmem_limit_kib": 63488}
"""Blocks of products may take this much of a v6e's 128 MiB of vector memory, where 32 MiB is its own limit. A step of
`llama8b` computes for 0.68 s, with 52 MiB for 0.70 s; it compiles for 300 s of CPU time, with 52 MiB for 277 s."""

TPU: dict[str, Options] = {
    "TPU v4": ASYNCHRONOUS | SCATTERED | WHOLE_PRODUCTS,
    "TPU v5 lite": ASYNCHRONOUS | SCATTERED | WHOLE_PRODUCTS,
    "TPU v5": ASYNCHRONOUS | SCATTERED | WHOLE_PRODUCTS,
    "TPU v6 lite": ASYNCHRONOUS | SCATTERED | WHOLE_PRODUCTS | ON_SPARSE_CORES | LARGER_BLOCKS,
    "TPU7x": ASYNCHRONOUS | SCATTERED | WHOLE_PRODUCTS,
}
"""By what JAX calls the kind of device: v4, v5e, v5p, v6e and tpu7x."""
GPU: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}
"""Exchanges are started early and awaited late."""


def compiler_options(config: Config, mesh: Mesh) -> dict[str, Any]:
    """The options that the step is compiled with on the devices of a mesh; none for CPUs."""
    if config.train.compiler_options == "none":
        return {}
    device = mesh.devices.flat[0]
    return dict(GPU) if device.platform in ("gpu", "cuda", "rocm") else dict(TPU.get(device.device_kind, {}))
