# SPDX-License-Identifier: Apache-2.0
"""A step's time and memory without a compiler, from the model's shapes: for GPUs, and to choose what to compile."""

import dataclasses
import math
from typing import Any

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.config import Config, ModelConfig
from llm_jepa_jax.flops import layer_weights
from llm_jepa_jax.models.attention.splash import block_sizes
from llm_jepa_jax.models.lora import abstract_adapters
from llm_jepa_jax.models.transformer import count_params
from llm_jepa_jax.plan.chips import Chip
from llm_jepa_jax.plan.kernels import visited
from llm_jepa_jax.plan.links import Links, exchange_seconds
from llm_jepa_jax.plan.memory import Memory, state_bytes
from llm_jepa_jax.plan.schedule import Timeline, Traffic
from llm_jepa_jax.plan.topology import Topology

ELEMENTWISE = 40
"""How often a block, forward and backward, reads or writes an array of the residual stream's size."""
LIVE_LAYERS = 2
"""Layers whose gathered weights are held at one time."""
KEPT = {"full": 1.0, "hidden": 2.0, "dots": 2.0, "none": 20.0}
"""Arrays of the residual stream's size that a layer keeps beside its products' outputs."""
KEPT_ON_TPUS = KEPT | {"hidden": 0.0, "dots": 0.0}
"""There the products' outputs are all: `llama8b` on v6e, `dots`, was compiled to what they take (libtpu 0.0.42)."""
AT_RISK = {"fsdp": 0.5, "data": 0.5, "slice": 0.5, "context": 0.5, "tensor": 1.0}
"""Share of an axis's exchanges that is expected to be waited for: all of those that the next product needs."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One device's part of a micro-batch."""

    tokens: float
    targets: float
    rows: float
    tensor: int
    fsdp: int
    """Devices that a copy of the parameters is stored over, beside `tensor`: those of `fsdp` and of `context`."""
    data: int
    parts: int


def sizes_of(config: Config, shape: RowShape, mesh: dict[str, int]) -> Sizes:
    """What one device computes of one micro-batch."""
    tensor, fsdp = mesh.get("tensor", 1), mesh.get("fsdp", 1) * mesh.get("context", 1)
    data = math.prod(size for axis, size in mesh.items() if axis not in ("tensor", "fsdp", "context"))
    parts = config.train.micro_batches
    rows = config.data.rows_per_step / parts / (data * fsdp)
    return Sizes(rows * shape.width, rows * shape.target_slots, rows, tensor, fsdp, data, parts)


def product_widths(model: ModelConfig, remat: str = "dots") -> tuple[int, int]:
    """Values a token of a block that a remat policy keeps beside the residual stream, of what its products give: those
    that `tensor` cuts, and those that it sums, which each of its devices has whole."""
    if remat == "full":
        return 0, 0
    heads = model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)  # queries, keys, values, what they mix to
    hidden = 0 if remat == "hidden" else (2 if model.mlp_gated else 1) * model.mlp_dim
    return heads + hidden, 2 * model.embed_dim


def repeated_weights(model: ModelConfig, remat: str) -> int:
    """Parameters of the products that the backward pass runs forward again."""
    if remat == "full":
        return layer_weights(model)
    return (2 if model.mlp_gated else 1) * model.embed_dim * model.mlp_dim if remat == "hidden" else 0


def memory_of(config: Config, shape: RowShape, state: Any, mesh: dict[str, int], chip: Chip) -> Memory:
    """The memory of a step; the state exactly, the rest by the largest things that live at one time."""
    model, size = config.model, sizes_of(config, shape, mesh)
    width = 2 if config.train.dtype == "bfloat16" else 4
    residual = size.tokens * model.embed_dim * width
    on_tpu = chip.platform == "tpu"
    activations = model.num_layers * (KEPT_ON_TPUS if on_tpu else KEPT)[config.train.remat] * residual
    cut, whole = product_widths(model, config.train.remat)
    activations += model.num_layers * size.tokens * (cut / size.tensor + whole) * width
    kinds = state_bytes(state)
    gradients = kinds["parameters"]
    head = model.embed_dim * model.vocab_size / size.tensor
    chunk = min(config.objective.head_chunk, size.targets) * model.vocab_size / size.tensor
    layers = LIVE_LAYERS * layer_weights(model) / size.tensor * width
    inner = size.tokens * (3 * sum(product_widths(model)) / size.tensor + 6 * model.embed_dim) * width
    # The head, its gradient (of several chunks a float32 sum) and logits; TPUs hold one copy of each, as compiled.
    copies = 1 if on_tpu else 2
    by_head = 4 if config.objective.head_chunk < size.targets else width
    temporaries = max(head * (width + by_head * copies) + chunk * 4 * copies, layers + inner)
    rows = 4.0 * size.rows * size.parts * (3 * shape.width + 3 * shape.target_slots)
    return Memory(**kinds, batch=rows, activations=activations, gradients=gradients, temporaries=temporaries,
                  available=chip.hbm)  # fmt: skip


def timeline_of(config: Config, shape: RowShape, topology: Topology, links: Links, mesh: dict[str, int]) -> Timeline:
    """The time of a step."""
    model, size, chip = config.model, sizes_of(config, shape, mesh), topology.chip
    timeline, remat = Timeline(), config.train.remat
    num_products = 2 if config.lora.rank else 3  # frozen weights have no gradient
    weights = num_products * layer_weights(model) + repeated_weights(model, remat)
    layers = 2.0 * size.tokens * model.num_layers * weights / size.tensor
    head = 2.0 * num_products * size.targets * model.embed_dim * model.vocab_size / size.tensor
    timeline.product_flops = size.parts * (layers + head)
    context = mesh.get("context", 1)
    part = shape.length // context  # the last one's work is every one's
    seen = shape.longest_segment if chip.attention.skips_segments else shape.length
    block = block_sizes(part, shape.longest_segment).block_q if part % 128 == 0 else 64
    places = visited(part, seen, block, shape.length - part)
    pairs = size.rows * context * model.num_heads / size.tensor * places
    kept = remat == "none" or (remat != "full" and chip.platform == "tpu")
    passes = {"fwd": 2.0 if kept else 4.0, "bwd": 7.0}
    kernels = {name: 2.0 * model.head_dim * pairs * products * model.num_layers for name, products in passes.items()}
    timeline.kernel_flops = size.parts * sum(kernels.values())
    width = 2 if config.train.dtype == "bfloat16" else 4
    elementwise = model.num_layers * ELEMENTWISE * size.tokens * model.embed_dim * width
    chunks = math.ceil(size.targets / config.objective.head_chunk)
    # Each of several chunks reads and writes them, if there are any.
    summed = 0 if config.lora.rank or chunks == 1 else chunks
    head_sums = 8.0 * summed * model.embed_dim * model.vocab_size / size.tensor
    timeline.hbm_bytes = size.parts * (elementwise + head_sums)
    if chip.peak:
        timeline.compute = (
            timeline.product_flops / (chip.peak * chip.product_share) + timeline.hbm_bytes / chip.hbm_bandwidth
        )
        shares = (chip.attention.forward, chip.attention.backward)
        timeline.kernels = size.parts * sum(
            flops / (chip.peak * share) for flops, share in zip(kernels.values(), shares, strict=True)
        )
    _add_exchanges(timeline, config, shape, size, links, mesh, width)
    return timeline


def _add_exchanges(
    timeline: Timeline,
    config: Config,
    shape: RowShape,
    size: Sizes,
    links: Links,
    mesh: dict[str, int],
    width: int,
) -> None:
    model = config.model
    weights = (model.num_layers * layer_weights(model) + model.embed_dim * model.vocab_size) / size.tensor
    trained = count_params(abstract_adapters(config)[0]) if config.lora.rank else weights
    residual = size.tokens * model.embed_dim * width
    again = config.train.remat != "none"
    context = mesh.get("context", 1)
    part = shape.length // context
    back = min(context - 1, math.ceil((shape.longest_segment or shape.length) / part))
    keys = 2.0 * back * size.tokens * model.num_kv_heads * model.head_dim / size.tensor * width
    exchanges = {
        ("fsdp", "all-gather"): (2 * weights * width * size.parts, 2 * model.num_layers * size.parts),
        ("fsdp", "reduce-scatter"): (trained * width * size.parts, model.num_layers * size.parts),
        ("data", "all-reduce"): (trained / size.fsdp * 4, model.num_layers),
        ("slice", "all-reduce"): (trained / size.fsdp * 4, model.num_layers),
        ("context", "collective-permute"): (
            keys * model.num_layers * (3 if again else 2) * size.parts, 4 * back * model.num_layers * size.parts,
        ),
        ("tensor", "all-reduce"): (
            residual * model.num_layers * (6 if again else 4) * size.parts, 4 * model.num_layers * size.parts,
        ),
    }  # fmt: skip
    for (axis, kind), (num_bytes, count) in exchanges.items():
        if mesh.get(axis, 1) == 1:
            continue
        route = links.route(_group(mesh, axis))
        # On three torus dimensions at a time the compiler gathers by all-reduce (libtpu 0.0.42): twice the bytes sent.
        by_sum = route.name.count("ring") + route.name.count("row") > 2 and kind != "all-reduce"
        seconds = count * exchange_seconds(route, "all-reduce" if by_sum else kind, num_bytes / count)
        exposed = AT_RISK[axis] * seconds
        timeline.exposed += exposed
        timeline.traffic[(route.axes, route.name, kind)] = Traffic(num_bytes, seconds, exposed, int(count))


def _group(mesh: dict[str, int], axis: str) -> tuple[int, ...]:
    """The devices (places in the mesh) of the first group along an axis."""
    names = list(mesh)
    stride = math.prod(mesh[name] for name in names[names.index(axis) + 1 :])
    return tuple(stride * step for step in range(mesh[axis]))
