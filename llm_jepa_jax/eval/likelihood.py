# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens, in batches of few shapes over the mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.eval.batching import fitting_rows, forward_bytes, free_bytes, in_batches, weight_bytes
from llm_jepa_jax.eval.encode import LENGTH_MULTIPLE, hidden_states, pad_right
from llm_jepa_jax.models.transformer import head_kernel, logits
from llm_jepa_jax.objectives.term import gather
from llm_jepa_jax.parallel.sharding import num_row_shards, replicated, rows_sharding

SLOT_CHUNK = 8
"""Slots of each row whose logits exist at one time."""


class Question(NamedTuple):
    """A sequence, and which tokens' probabilities behind which of its prefixes are wanted."""

    tokens: tuple[int, ...]
    slots: tuple[tuple[int, int], ...]
    """(place i, token): the probability of the token behind `tokens[: i + 1]`; any number, in any order."""


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _log_probabilities(
    params: Any,
    tokens_RxL: jax.Array,
    lengths_R: jax.Array,
    index_RxM: jax.Array,
    targets_RxM: jax.Array,
    *,
    config: ModelConfig,
    dtype: Any,
) -> jax.Array:
    """float32 [R, M]. Logits and what is made of them are float32, a few slots of each row at a time."""
    (hidden_RxLxD,) = hidden_states(params, tokens_RxL, lengths_R, config=config, dtype=dtype)
    head_DxV = head_kernel(params, config).astype(dtype)

    def chunk(slots: tuple[jax.Array, jax.Array]) -> jax.Array:
        index_RxC, targets_RxC = slots
        logits_RxCxV = logits(head_DxV, params.get("head_bias"), config, gather(hidden_RxLxD, index_RxC))
        wanted_RxC = jnp.take_along_axis(logits_RxCxV, targets_RxC[..., None], axis=2)[..., 0]
        return wanted_RxC - jax.nn.logsumexp(logits_RxCxV, axis=2)

    rows, slots = index_RxM.shape
    chunks = [a.reshape(rows, slots // SLOT_CHUNK, SLOT_CHUNK).swapaxes(0, 1) for a in (index_RxM, targets_RxM)]
    return jax.lax.map(chunk, tuple(chunks)).swapaxes(0, 1).reshape(rows, slots)


def _padded_slots(questions: Sequence[Question], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and tokens int32 [rows, M], M the chunk doubled until all fit; free slots ask for token 0 at place 0."""
    most = max(len(question.slots) for question in questions)
    size = SLOT_CHUNK
    while size < most:
        size *= 2
    index_RxM, targets_RxM = np.zeros((rows, size), np.int32), np.zeros((rows, size), np.int32)
    for row, question in enumerate(questions):
        index_RxM[row, : len(question.slots)] = [place for place, _ in question.slots]
        targets_RxM[row, : len(question.slots)] = [token for _, token in question.slots]
    return index_RxM, targets_RxM


def log_probabilities(
    params: Any,
    config: ModelConfig,
    questions: Sequence[Question],
    mesh: Mesh,
    dtype: Any,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """Natural log-probability of each question's slots, float32 [slots] each, in the order given.

    Over all ids of the model: `exp(-mean)` of a text's own tokens is its perplexity as others count it. Sequences are
    sorted by length, so a result depends on its batch by rounding alone. `batch_size` is that of `eval.batch_size`,
    `progress` is called with the number done.

    Raises:
        UserError: one sequence a device does not fit memory.
    """
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].tokens), len(questions[i].slots)))
    shards = num_row_shards(mesh)
    free = 0.0 if batch_size else free_bytes(mesh) - weight_bytes(params, mesh, dtype)

    def rows_for(longest: int, left: int) -> int:
        if batch_size:
            return -(-min(batch_size, len(questions)) // shards) * shards
        length = len(questions[longest].tokens) + LENGTH_MULTIPLE
        row_bytes = forward_bytes(config, mesh.shape["tensor"], length, SLOT_CHUNK, dtype)
        return fitting_rows(row_bytes, free, left, mesh)

    def run(chosen: Sequence[int], rows: int) -> None:
        batch = [questions[i] for i in chosen]
        arrays = (*pad_right([question.tokens for question in batch], rows), *_padded_slots(batch, rows))
        placed = [jax.make_array_from_callback(a.shape, rows_sharding(mesh), a.__getitem__) for a in arrays]
        found = _log_probabilities(params, *placed, config=config, dtype=dtype)
        found_RxM = np.asarray(jax.device_put(found, replicated(mesh)))
        for row, i in enumerate(chosen):
            out[i] = found_RxM[row, : len(questions[i].slots)]

    with jax.set_mesh(mesh):
        in_batches(order, rows_for, run, shards, progress)
    return out
