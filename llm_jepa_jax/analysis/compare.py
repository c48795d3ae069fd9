# SPDX-License-Identifier: Apache-2.0
"""Where two models part: both read the same random tokens, one after the other, and are compared layer by layer."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.models.transformer import State, forward_states, head_kernel, logits
from llm_jepa_jax.objectives.term import gather
from llm_jepa_jax.parallel.sharding import num_row_shards, replicated, rows_sharding

HIDDEN_TOLERANCE, LOGIT_TOLERANCE = 1e-5, 1e-4
"""Of hidden states: root mean square of the difference over that of the first model's. Of logits: largest difference
over the first model's largest logit."""
PLACES = 128
"""Tokens of one kind of input that are compared, over all its rows."""
SHORT, PACKED, LONG = 256, 512, 1024
"""Tokens of a row. Long rows have a quarter more than what the model treats otherwise behind some place."""
STATE_BYTES = 1 << 30
"""Of the hidden states that a device holds at a time."""


class Input(NamedTuple):
    """Rows of random tokens; segment 0 is padding."""

    name: str
    tokens_RxL: np.ndarray
    positions_RxL: np.ndarray
    segments_RxL: np.ndarray
    places_RxS: np.ndarray
    """Where states are compared."""


class Measured(NamedTuple):
    """One model on one input, at its P places."""

    states_NxPxD: np.ndarray
    """float32: embeddings, what each layer gives, and that of the last one behind the final norm."""
    logits_PxV: np.ndarray
    """float32, of the tokens that both models have."""


class Difference(NamedTuple):
    """Of one layer, the worst over all inputs."""

    name: str
    max_abs: float
    relative: float
    """Hidden states: relative root mean square. Logits: largest difference over the largest logit."""

    @property
    def departs(self) -> bool:
        """Whether it is above its tolerance, or not finite."""
        return not self.relative <= (LOGIT_TOLERANCE if self.name == "logits" else HIDDEN_TOLERANCE)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models compared."""

    layers: tuple[Difference, ...]
    """Embedding, layers from 0 as published files number them, final norm, logits."""
    inputs: dict[str, dict[str, float]]
    """By kind of input: `hidden_relative_rms`, `logit_max_abs`, `kl_mean`, `kl_max` (nats), `top1_agreement`."""
    tokens: int
    """How many were compared."""

    @property
    def first_departing(self) -> Difference | None:
        """The first layer above its tolerance."""
        return next((layer for layer in self.layers if layer.departs), None)

    @property
    def identical(self) -> bool:
        return all(layer.max_abs == 0 for layer in self.layers)

    def worst(self, name: str) -> float:
        """The worst value over the inputs."""
        values = [scores[name] for scores in self.inputs.values()]
        return min(values) if name == "top1_agreement" else max(values)


def long_length(model: ModelConfig, max_positions: int) -> tuple[int, int]:
    """Tokens of a long row, and the place that they should go past: a window's, or that of the ropes' scaling."""
    scaling = model.rope_scaling
    scaled = scaling.original_max_positions if scaling.kind != "linear" and scaling.factor != 1 else 0
    threshold = max(model.window, scaled)
    return min(max(LONG, threshold + threshold // 4), model.max_positions, max_positions), threshold


def make_inputs(model: ModelConfig, vocab_size: int, mesh: Mesh, max_positions: int, seed: int) -> list[Input]:
    """Sequences (`random`), rows of several segments with padding behind them (`packed`), and `long` rows."""
    rng = np.random.default_rng(seed)
    rows = -(-2 // num_row_shards(mesh)) * num_row_shards(mesh)
    most = min(model.max_positions, max_positions)
    shapes = {"random": min(SHORT, most), "packed": min(PACKED, most), "long": long_length(model, max_positions)[0]}
    inputs = []
    for name, length in shapes.items():
        segments_RxL = np.ones((rows, length), np.int32)
        if name == "packed":
            segments_RxL = np.stack([_segments(rng, length) for _ in range(rows)])
        starts_RxL = np.diff(segments_RxL, axis=1, prepend=0) != 0
        places_L = np.arange(length)
        positions_RxL = places_L - np.maximum.accumulate(np.where(starts_RxL, places_L, 0), axis=1)
        ends_R = (segments_RxL > 0).sum(axis=1)
        places_RxS = np.stack([np.linspace(0, end - 1, max(1, PLACES // rows)) for end in ends_R])
        tokens_RxL = rng.integers(0, vocab_size, (rows, length))
        arrays = (tokens_RxL, positions_RxL, segments_RxL, places_RxS.round())
        inputs.append(Input(name, *(array.astype(np.int32) for array in arrays)))
    return inputs


def _segments(rng: np.random.Generator, length: int) -> np.ndarray:
    """A row of segments of random lengths, numbered from 1, with padding (0) behind them."""
    segments_L, start, number = np.zeros(length, np.int32), 0, 1
    while start < length - length // 8:
        end = min(start + int(rng.integers(1, max(2, length // 3))), length - length // 16)
        segments_L[start:end] = number
        start, number = max(end, start + 1), number + 1
    return segments_L


@functools.partial(jax.jit, static_argnames=("config", "states", "mesh"))
def _states_at(
    params: Any, arrays: tuple[jax.Array, ...], *, config: ModelConfig, states: tuple[State, ...], mesh: Mesh
) -> jax.Array:
    """Hidden states at the places, [states, P, D]."""
    tokens_RxL, positions_RxL, segments_RxL, places_RxS = arrays
    found = forward_states(
        params, config, tokens_RxL, positions_RxL, segments_RxL, dtype=jnp.float32, states=states
    )  # fmt: skip
    states_NxRxSxD = jnp.stack([gather(hidden_RxLxD, places_RxS) for hidden_RxLxD in found])
    return jax.lax.with_sharding_constraint(states_NxRxSxD.reshape(len(states), -1, config.embed_dim), replicated(mesh))


@functools.partial(jax.jit, static_argnames=("config", "size", "mesh"))
def _logits(params: Any, hidden_PxD: jax.Array, *, config: ModelConfig, size: int, mesh: Mesh) -> jax.Array:
    """Logits of the first `size` tokens, [P, size]."""
    head_DxV = head_kernel(params, config).astype(jnp.float32)
    logits_PxV = logits(head_DxV, params.get("head_bias"), config, hidden_PxD)
    return jax.lax.with_sharding_constraint(logits_PxV[:, :size], replicated(mesh))


def measure(
    params: Any,
    model: ModelConfig,
    mesh: Mesh,
    inputs: Sequence[Input],
    vocab_size: int,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Measured]:
    """A model on each input, computed in float32; logits are those of the first `vocab_size` tokens.

    Deep and wide models read an input several times, each time for as many layers as fit into `STATE_BYTES`.
    """
    states = (*((layer, False) for layer in range(model.num_layers + 1)), (model.num_layers, True))
    measured = []
    for given in inputs:
        progress(given.name)
        state_bytes = given.tokens_RxL.size * model.embed_dim * 4 // num_row_shards(mesh)
        group = max(1, STATE_BYTES // state_bytes)
        found = []
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            rows = rows_sharding(mesh)
            arrays = tuple(jax.make_array_from_callback(array.shape, rows, array.__getitem__) for array in given[1:])
            for first in range(0, len(states), group):
                wanted = states[first : first + group]
                states_NxPxD = _states_at(params, arrays, config=model, states=wanted, mesh=mesh)
                found.append(np.asarray(states_NxPxD.addressable_data(0)))
            last_PxD = states_NxPxD[-1]
            logits_PxV = _logits(params, last_PxD, config=model, size=vocab_size, mesh=mesh)
        measured.append(Measured(np.concatenate(found), np.asarray(logits_PxV.addressable_data(0))))
    return measured


def compare(first: Sequence[Measured], second: Sequence[Measured], inputs: Sequence[Input]) -> Comparison:
    """The second model against the first, on the same inputs."""
    names = [f"layer {i}" for i in range(len(first[0].states_NxPxD) - 2)]
    names = ["embedding", *names, "final norm"]
    differences: dict[str, list[tuple[float, float]]] = {name: [] for name in [*names, "logits"]}
    scores = {}
    for given, ours, theirs in zip(inputs, first, second, strict=True):
        for name, a_PxD, b_PxD in zip(names, ours.states_NxPxD, theirs.states_NxPxD, strict=True):
            gap_PxD = np.abs(a_PxD.astype(np.float64) - b_PxD)
            scale = np.sqrt(np.mean(np.square(a_PxD, dtype=np.float64)))
            differences[name].append((_finite(gap_PxD.max()), _ratio(np.sqrt(np.mean(gap_PxD**2)), scale)))
        gap = float(np.abs(ours.logits_PxV - theirs.logits_PxV).max())
        differences["logits"].append((_finite(gap), _ratio(gap, np.abs(ours.logits_PxV).max())))
        agreement = np.mean(ours.logits_PxV.argmax(axis=1) == theirs.logits_PxV.argmax(axis=1))
        kl_P = _divergence(ours.logits_PxV, theirs.logits_PxV)
        scores[given.name] = {
            "length": given.tokens_RxL.shape[1],
            "hidden_relative_rms": max(differences[name][-1][1] for name in names),
            "logit_max_abs": _finite(gap),
            "kl_mean": _finite(kl_P.mean()),
            "kl_max": _finite(kl_P.max()),
            "top1_agreement": float(agreement),
        }
    layers = tuple(Difference(name, *(max(v) for v in zip(*found, strict=True))) for name, found in differences.items())
    return Comparison(layers, scores, sum(given.places_RxS.size for given in inputs))


def _finite(value: Any) -> float:
    """What is no number is as far off as can be."""
    return float(value) if np.isfinite(value) else float("inf")


def _ratio(difference: Any, scale: Any) -> float:
    if difference == 0:
        return 0.0
    return _finite(difference / scale) if scale else float("inf")


def _divergence(first_PxV: np.ndarray, second_PxV: np.ndarray) -> np.ndarray:
    """KL(first ‖ second) of the next token at each place, nats, float64 [P]."""
    logs = []
    for logits_PxV in (first_PxV, second_PxV):
        shifted_PxV = logits_PxV.astype(np.float64) - logits_PxV.max(axis=1, keepdims=True)
        logs.append(shifted_PxV - np.log(np.exp(shifted_PxV).sum(axis=1, keepdims=True)))
    return np.maximum((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1), 0.0)


def verdict(exact: Comparison, rounded: Comparison | None, types: str) -> tuple[bool, str]:
    """Whether two models are equal, and the line that says how far.

    `rounded` compares them with every weight of both in the coarser of its two stored types, which are `types`: what
    is equal then differed by that rounding alone.
    """
    if exact.identical:
        return True, "equal to the last bit"
    if exact.first_departing is None:
        return True, f"equal to {LOGIT_TOLERANCE:g} (hidden states to {HIDDEN_TOLERANCE:g})"
    if rounded and rounded.first_departing is None:
        return True, f"equal up to the rounding of {types} weights"
    first = (rounded or exact).first_departing or exact.first_departing
    what = "largest difference over largest logit" if first.name == "logits" else "relative RMS"
    beyond = f" beyond the rounding of {types} weights" if rounded else ""
    return False, f"DIFFERENT{beyond}: the first layer that departs is {first.name} ({what} {first.relative:.1e})"
