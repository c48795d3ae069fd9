# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: cross-entropy at target slots only (LLM-JEPA, arXiv 2509.14252, L_LLM of eq. 2)."""

import jax
import jax.numpy as jnp

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.objectives.term import Inputs, Objective, gather
from llm_jepa_jax.parallel.sharding import constrain


def ntp_weight(batch: Batch) -> jax.Array:
    """Number of targets, float32 scalar."""
    return jnp.sum(batch.target_weight, dtype=jnp.float32)


def ntp_sum(inputs: Inputs) -> jax.Array:
    """Sum of the cross-entropy over target slots, float32 scalar, in nats.

    Logits exist for `head_chunk` slots of each row at a time, in float32, and are computed again in the backward
    pass; no array of [rows, length, vocabulary] is ever made.
    """
    batch = inputs.batch
    with jax.named_scope("ntp_loss"):
        hidden_RxMxD = gather(inputs.hidden_RxLxD, batch.target_index)
        num_slots = batch.targets.shape[1]
        num_chunks = -(-num_slots // inputs.config.head_chunk)
        size = -(-num_slots // num_chunks)
        chunks = jax.tree.map(
            lambda x: _chunked(x, num_chunks, size), (hidden_RxMxD, batch.targets, batch.target_weight)
        )

        @jax.checkpoint
        def chunk_sum(total: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + _cross_entropy(inputs.head_DxV, *chunk), None

        return jax.lax.scan(chunk_sum, jnp.zeros((), jnp.float32), chunks)[0]


def _chunked(array: jax.Array, num_chunks: int, size: int) -> jax.Array:
    """[R, M, ...] to [chunks, R, size, ...], padded with zeros (weight 0)."""
    padding = [(0, 0), (0, num_chunks * size - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    padded = jnp.pad(array, padding)
    return padded.reshape(array.shape[0], num_chunks, size, *array.shape[2:]).swapaxes(0, 1)


def _cross_entropy(
    head_DxV: jax.Array, hidden_RxCxD: jax.Array, targets_RxC: jax.Array, weight_RxC: jax.Array
) -> jax.Array:
    # The head is cast here, inside the chunk, so that its gradient is added over chunks in the parameter's type.
    logits_RxCxV = jnp.einsum(
        "rcd,dv->rcv", hidden_RxCxD, head_DxV.astype(hidden_RxCxD.dtype), preferred_element_type=jnp.float32
    )
    logits_RxCxV = constrain(logits_RxCxV, "rows", "slots", "vocab")
    log_partition_RxC = jax.nn.logsumexp(logits_RxCxV, axis=-1)
    target_logit_RxC = jnp.take_along_axis(logits_RxCxV, targets_RxC[..., None], axis=-1)[..., 0]
    return jnp.sum((log_partition_RxC - target_logit_RxC) * weight_RxC)


NTP = Objective(name="ntp", scale=lambda config: config.ntp.weight, weight=ntp_weight, total=ntp_sum)
