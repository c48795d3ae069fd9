# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: cross-entropy at target slots only (LLM-JEPA, arXiv 2509.14252, L_LLM of eq. 2)."""

import jax
import jax.numpy as jnp

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.objectives.head import HeadSettings, cross_entropy
from llm_jepa_jax.objectives.term import Inputs, Objective


def ntp_weight(batch: Batch) -> jax.Array:
    """Number of targets, float32 scalar."""
    return jnp.sum(batch.target_weight, dtype=jnp.float32)


def ntp_sum(inputs: Inputs) -> jax.Array:
    """Sum of the cross-entropy over target slots, float32 scalar, in nats; with `ntp.z_loss`, that is added to it."""
    batch, config = inputs.batch, inputs.config
    num_ids = inputs.num_ids if inputs.num_ids < inputs.head_DxV.shape[1] else 0
    settings = HeadSettings(config.head_chunk, config.ntp.z_loss, inputs.soft_cap, num_ids)
    last_RxLxD = inputs.last_RxTxD[:, : batch.segments.shape[1]]  # branches have no targets
    with jax.named_scope("ntp_loss"):
        return cross_entropy(
            last_RxLxD, inputs.head_DxV, batch.target_index, batch.targets, batch.target_weight, settings,
            inputs.head_bias_V,
        )  # fmt: skip


NTP = Objective("ntp", ntp_weight, ntp_sum)
