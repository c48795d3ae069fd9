# SPDX-License-Identifier: Apache-2.0
"""The language-model head and its cross-entropy in one: logits of a few targets at a time, never stored.

While the logits of a chunk of targets exist, its loss and its gradients are computed from them. So a chunk costs three
products (logits, and the gradients of hidden states and head; two where the head is not trained), where a backward
pass that recomputes costs four, and the largest array is [chunk, vocabulary]. Of several chunks, those without a
target are not visited: the work follows the targets, not the slots.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jepa_jax.models.symbolic import filled, known
from llm_jepa_jax.parallel.sharding import (
    LENGTH_AXIS,
    PARAMETER_RULES,
    activation_axes,
    activation_spec,
    length_parts,
)


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """What the compiled head is made for."""

    chunk: int
    """Targets of one device whose logits exist at one time."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of each target; 0: off."""
    soft_cap: float = 0.0
    """Logits become cap · tanh(logits / cap); 0: off."""
    num_ids: int = 0
    """Columns from this one on are padding: they have no probability, and their gradient is 0. 0: there is none."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def cross_entropy(
    hidden_RxLxD: jax.Array,
    head_DxV: jax.Array,
    index_RxM: jax.Array,
    targets_RxM: jax.Array,
    weight_RxM: jax.Array,
    settings: HeadSettings,
    bias_V: jax.Array | None = None,
) -> jax.Array:
    """Sum over target slots of weight · (cross-entropy + z_loss · log-partition²), float32 scalar, in nats.

    Slot m of row r predicts `targets[r, m]` from `hidden[r, index[r, m]]`. Slots with weight 0 are free; the used ones
    of a row have different indices. `bias_V`, if any, is added to the logits. Logits and everything made from them are
    float32 whatever the type of `hidden`.
    """
    length = hidden_RxLxD.shape[1]
    slots = _dealt(length, index_RxM, targets_RxM, weight_RxM)
    return _everywhere(settings, "", length, bias_V is not None)(hidden_RxLxD, head_DxV, *slots, bias_V)[0]


def _forward(
    hidden_RxLxD: Any, head_DxV: Any, index_RxM: Any, targets_RxM: Any, weight_RxM: Any, settings: HeadSettings,
    bias_V: Any,
) -> tuple[jax.Array, Any]:  # fmt: skip
    (hidden_RxLxD, _), (head_DxV, head_is_trained), (bias_V, _) = map(known, (hidden_RxLxD, head_DxV, bias_V))
    wanted = "all" if head_is_trained else "hidden"
    length = hidden_RxLxD.shape[1]
    slots = _dealt(length, *(known(array)[0] for array in (index_RxM, targets_RxM, weight_RxM)))
    compute = _everywhere(settings, wanted, length, bias_V is not None)
    total, *grads = compute(hidden_RxLxD, head_DxV, *slots, bias_V)
    by_hidden, by_head, by_bias = (*grads, None, None)[:3]
    by_head = None if by_head is None else by_head.astype(head_DxV.dtype)
    return total, (by_hidden, by_head, None if by_bias is None else by_bias.astype(bias_V.dtype))


def _backward(settings: HeadSettings, grads: Any, scale: Any) -> tuple[Any, ...]:
    scale = filled(scale)
    by_hidden, by_head, by_bias = jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads)
    return by_hidden, by_head, None, None, None, by_bias


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _dealt(length: int, *slots_RxM: jax.Array) -> tuple[jax.Array, ...]:
    """The slots, dealt in turn to the parts that a row is cut into, so that all have as many used ones."""
    parts = length_parts(length)
    if parts == 1:
        return slots_RxM

    def deal(slots_RxM: jax.Array) -> jax.Array:
        rows, num_slots = slots_RxM.shape
        even = jnp.pad(slots_RxM, ((0, 0), (0, -num_slots % parts)))  # a free slot has weight 0
        return even.reshape(rows, -1, parts).swapaxes(1, 2).reshape(rows, -1)

    return tuple(map(deal, slots_RxM))


def _everywhere(settings: HeadSettings, gradients: str, length: int, with_bias: bool) -> Any:
    """The local computation on every device of the mesh: gradients of the head are added up once, behind the loop.
    `gradients` are `all`, those by `hidden` states, or none at all (empty). Where rows of this length are cut into
    parts, a device gathers them whole and takes its share of their targets.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return functools.partial(_local, settings=settings, gradients=gradients)
    cut = length_parts(length) > 1
    rows = activation_spec("rows", "length" if cut else None)
    vocabulary = PARAMETER_RULES["vocab"]
    bias = PartitionSpec(vocabulary) if with_bias else None
    out_specs = (PartitionSpec(), rows, PartitionSpec(PARAMETER_RULES["embed"], vocabulary), bias)
    return jax.shard_map(
        functools.partial(_local, settings=settings, gradients=gradients, rows=activation_axes("rows"), cut=cut),
        in_specs=(rows, PartitionSpec(None, vocabulary), rows, rows, rows, bias),
        out_specs=out_specs[: {"all": 4, "hidden": 2, "": 1}[gradients]],
        check_vma=False,
    )


def _local(
    hidden_RxLxD: jax.Array,
    head_DxV: jax.Array,
    index_RxM: jax.Array,
    targets_RxM: jax.Array,
    weight_RxM: jax.Array,
    bias_V: jax.Array | None,
    *,
    settings: HeadSettings,
    gradients: str,
    rows: tuple[str, ...] = (),
    cut: bool = False,
) -> tuple[Any, ...]:
    """One device's targets against its part of the vocabulary: the sum, and the gradients if they are wanted. `rows`
    are the mesh axes that rows are cut over (none: there is no mesh); `cut`: they are cut along their length too.
    """
    sharded = bool(rows)
    if cut:
        rows = (*rows, LENGTH_AXIS)
        hidden_RxLxD = jax.lax.all_gather(hidden_RxLxD, LENGTH_AXIS, axis=1, tiled=True)
    hidden_NxD = hidden_RxLxD.reshape(-1, hidden_RxLxD.shape[-1])
    head_DxV = head_DxV.astype(hidden_NxD.dtype)
    slots, num_targets, size = _used_first(hidden_RxLxD.shape[1], index_RxM, targets_RxM, weight_RxM, settings.chunk)
    first_id = jax.lax.axis_index(PARAMETER_RULES["vocab"]) * head_DxV.shape[1] if sharded else 0
    is_id_V = first_id + jnp.arange(head_DxV.shape[1]) < settings.num_ids if settings.num_ids else None

    def add_chunk(number: jax.Array | int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        place_C, target_C, weight_C = (jax.lax.dynamic_slice_in_dim(slot, number * size, size) for slot in slots)
        hidden_CxD = jnp.take(hidden_NxD, place_C, axis=0, mode="clip")
        logits_CxV = _dot(hidden_CxD, head_DxV, 1, 0)
        if bias_V is not None:
            logits_CxV += bias_V.astype(jnp.float32)
        loss, dlogits_CxV = _chunk_loss(logits_CxV, target_C - first_id, weight_C, is_id_V, settings, sharded)
        if not gradients:
            return (carry[0] + loss,)
        total, dhidden_NxD, *of_head = carry
        wide_CxV, dlogits_CxV = dlogits_CxV, dlogits_CxV.astype(hidden_NxD.dtype)
        dhidden_CxD = _over_vocabulary(jax.lax.psum, _dot(dlogits_CxV, head_DxV, 1, 1), sharded)
        dhidden_NxD = dhidden_NxD.at[place_C].set(dhidden_CxD.astype(dhidden_NxD.dtype), mode="drop")
        if of_head:
            dhead_DxV, dbias_V = of_head
            dbias_V = None if dbias_V is None else dbias_V + wide_CxV.sum(axis=0)
            of_head = [dhead_DxV + _dot(hidden_CxD, dlogits_CxV, 0, 0), dbias_V]
        return total + loss, dhidden_NxD, *of_head

    zeros: tuple[Any, ...] = (jnp.zeros((), jnp.float32),)
    if gradients:
        zeros += (jnp.zeros_like(hidden_NxD),)
    if gradients == "all":
        zeros_V = None if bias_V is None else jnp.zeros(bias_V.shape, jnp.float32)
        zeros += (jnp.zeros(head_DxV.shape, jnp.float32), zeros_V)
    alone = len(slots[0]) == size  # one chunk is no loop, and its gradient of the head no sum
    total, *grads = add_chunk(0, zeros) if alone else jax.lax.fori_loop(0, -(-num_targets // size), add_chunk, zeros)
    dhidden = [grad.reshape(hidden_RxLxD.shape) for grad in grads[:1]]
    if cut:
        dhidden = [jax.lax.psum_scatter(grad, LENGTH_AXIS, scatter_dimension=1, tiled=True) for grad in dhidden]
    if not sharded:
        return total, *dhidden, *grads[1:]
    return jax.lax.psum(total, rows), *dhidden, *_over_rows(grads[1:], rows, hidden_NxD.dtype)


def _used_first(
    length: int, index_RxM: jax.Array, targets_RxM: jax.Array, weight_RxM: jax.Array, chunk: int
) -> tuple[tuple[jax.Array, ...], jax.Array, int]:
    """All slots of these rows in one list, used ones first: (place among all tokens, target, weight), their number, and
    the size of a chunk, which divides the list. A free slot's place is behind all tokens, where writing is void.
    """
    rows, num_slots = index_RxM.shape
    used_M = (weight_RxM > 0).reshape(-1)
    place_M = jnp.where(used_M, (index_RxM + jnp.arange(rows)[:, None] * length).reshape(-1), rows * length)
    order_M = jnp.argsort(~used_M, stable=True)
    size = min(chunk, rows * num_slots)
    room = (0, -(rows * num_slots) % size)
    slots = [array.reshape(-1)[order_M] for array in (place_M, targets_RxM, weight_RxM)]
    padded = (
        jnp.pad(slot, room, constant_values=fill) for slot, fill in zip(slots, (rows * length, 0, 0), strict=True)
    )
    return tuple(padded), jnp.sum(used_M, dtype=jnp.int32), size


def _chunk_loss(
    logits_CxV: jax.Array,
    target_C: jax.Array,
    weight_C: jax.Array,
    is_id_V: jax.Array | None,
    settings: HeadSettings,
    sharded: bool,
) -> tuple[jax.Array, jax.Array]:
    """The loss of C targets, and its gradient by their logits [C, V], float32. A target outside 0 to V - 1 belongs to
    another device's part of the vocabulary.
    """
    slope_CxV = None
    if settings.soft_cap:
        tanh_CxV = jnp.tanh(logits_CxV / settings.soft_cap)
        logits_CxV, slope_CxV = settings.soft_cap * tanh_CxV, 1.0 - tanh_CxV**2
    if is_id_V is not None:
        logits_CxV = jnp.where(is_id_V, logits_CxV, -jnp.inf)
    largest_C = _over_vocabulary(jax.lax.pmax, jnp.max(logits_CxV, axis=1), sharded)
    powers_CxV = jnp.exp(logits_CxV - largest_C[:, None])
    sum_C = _over_vocabulary(jax.lax.psum, jnp.sum(powers_CxV, axis=1), sharded)
    log_partition_C = largest_C + jnp.log(sum_C)
    is_target_CxV = jnp.arange(logits_CxV.shape[1]) == target_C[:, None]
    here_C = (target_C >= 0) & (target_C < logits_CxV.shape[1])
    found_C = jnp.take_along_axis(logits_CxV, jnp.where(here_C, target_C, 0)[:, None], axis=1)[:, 0]
    target_logit_C = _over_vocabulary(jax.lax.psum, jnp.where(here_C, found_C, 0.0), sharded)
    loss = jnp.sum(weight_C * (log_partition_C - target_logit_C + settings.z_loss * log_partition_C**2))
    by_partition_C = weight_C * (1.0 + 2.0 * settings.z_loss * log_partition_C)
    dlogits_CxV = powers_CxV * (by_partition_C / sum_C)[:, None] - jnp.where(is_target_CxV, weight_C[:, None], 0.0)
    return loss, dlogits_CxV if slope_CxV is None else dlogits_CxV * slope_CxV


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """Product of two matrices over one axis of each, accumulated in float32."""
    return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32)


def _over_vocabulary(collective: Any, value: jax.Array, sharded: bool) -> jax.Array:
    return collective(value, PARAMETER_RULES["vocab"]) if sharded else value


def _over_rows(of_head: list[Any], rows: tuple[str, ...], dtype: Any) -> list[Any]:
    """The gradients of head and bias (if any) over these axes, each device keeping what it stores of the head.

    The head's is added in the compute type, as those of layers are.
    """
    if not of_head:
        return []
    (dhead_DxV, dbias_V), stored = of_head, PARAMETER_RULES["embed"] or ()
    # The small part travels further: first what is scattered, which stays inside a slice.
    dhead_DxV = jax.lax.psum_scatter(dhead_DxV.astype(dtype), stored, scatter_dimension=0, tiled=True)
    dhead_DxV = jax.lax.psum(dhead_DxV, tuple(axis for axis in rows if axis not in stored))
    return [dhead_DxV, None if dbias_V is None else jax.lax.psum(dbias_V, rows)]
