# SPDX-License-Identifier: Apache-2.0
"""The one jitted step: both losses, accumulation over micro-batches, one update."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llm_jepa_jax.batch import Batch
from llm_jepa_jax.config import Config
from llm_jepa_jax.models.lora import joined
from llm_jepa_jax.models.transformer import Dropout, forward_states, head_kernel
from llm_jepa_jax.objective_config import JepaConfig, SpreadConfig
from llm_jepa_jax.objectives.distance import cosine
from llm_jepa_jax.objectives.jepa import pair_embeddings
from llm_jepa_jax.objectives.parameters import abstract_parameters
from llm_jepa_jax.objectives.term import Inputs
from llm_jepa_jax.objectives.total import enabled, term_scales, term_weights, total_loss, wanted_states
from llm_jepa_jax.parallel.compiler_options import compiler_options
from llm_jepa_jax.parallel.sharding import (
    LENGTH_AXIS,
    REPLICAS,
    activation_spec,
    is_axes,
    parameter_spec,
    replicated,
    rows_sharding,
)
from llm_jepa_jax.resolve import attention_backend
from llm_jepa_jax.train.optimizer import learning_rate
from llm_jepa_jax.train.state import StateFactory, TrainState

DIAGNOSTIC_PAIRS = 256
"""About how many pairs' embeddings a step hands out for the collapse diagnostics."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What the loss of a part of a step needs beside parameters and rows."""

    config: Config
    weights: dict[str, jax.Array]
    """Of each term, over the whole global batch."""
    scales: dict[str, Any]
    """Factor of each term in the total."""
    key: jax.Array
    longest_segment: int
    attention: str
    num_rows: int
    """Of the whole step."""
    frozen: Any = None
    """The parameters that are not trained."""
    micro_batch: jax.Array | int = 0

    @property
    def dropout(self) -> Dropout | None:
        """That of adapters: drawn from (seed, step, micro-batch), and for each layer anew."""
        share = self.config.lora.dropout
        return Dropout(share, jax.random.fold_in(self.key, self.micro_batch)) if share else None


def loss_and_aux(params: Any, batch: Batch, part: Part, layer_sums: Any = None) -> tuple[jax.Array, dict[str, Any]]:
    """Total loss of these rows under the global weights, and what the metrics need.

    Returns:
        The float32 total, and `sums` (each term's sum), `cos_sum` (of cos over pairs), `pairs`: text and code
        embeddings of the first slots of each row, [R, s, D] float32, with their weights [R, s].
    """
    config, objective = part.config, part.config.objective
    params = joined(params, part.frozen)
    wanted = wanted_states(objective, config.model.num_layers)
    states = forward_states(
        params, config.model, batch.tokens, batch.positions, batch.segments, batch.branch_end,
        states=wanted, dtype=jnp.dtype(config.train.dtype), remat=config.train.remat,
        attention=part.attention, longest_segment=part.longest_segment, layer_sums=layer_sums,
        dropout=part.dropout,
    )  # fmt: skip
    inputs = Inputs(
        dict(zip(wanted, states, strict=True)), head_kernel(params, config.model), batch, objective,
        config.model.num_layers, config.model.logit_soft_cap, params.get("head_bias"), params.get("predictors", {}),
        part.key, config.model.vocab_size,
    )  # fmt: skip
    total, sums = total_loss(inputs, part.weights, part.scales)
    pairs = pair_embeddings(inputs.vectors(objective.jepa), batch, objective.jepa)
    text_RxPxD, code_RxPxD = jax.lax.stop_gradient(pairs if objective.jepa.source == "text" else pairs[::-1])
    cos_sum = jnp.sum(cosine(text_RxPxD, code_RxPxD) * batch.pair_weight)
    slots = min(batch.pair_weight.shape[1], -(-DIAGNOSTIC_PAIRS // part.num_rows))
    pairs = (text_RxPxD[:, :slots], code_RxPxD[:, :slots], batch.pair_weight[:, :slots])
    return total, {"sums": sums, "cos_sum": cos_sum, "pairs": pairs}


def _split(batch: Batch, parts: int) -> Batch:
    """[R, ...] to [parts, R / parts, ...]. Part i takes rows i, i + parts, …, so no row leaves its device."""
    spec = activation_spec(None, "rows")

    def split(array: jax.Array) -> jax.Array:
        array = array.reshape(array.shape[0] // parts, parts, *array.shape[1:]).swapaxes(0, 1)
        return array if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(array, spec)

    return jax.tree.map(split, batch)


def gradients(
    params: Any,
    batch: Batch,
    config: Config,
    longest_segment: int = 0,
    attention: str = "xla",
    step: jax.Array | int = 0,
    num_steps: int = 1,
    frozen: Any = None,
) -> tuple[jax.Array, Any, dict[str, Any], dict[str, jax.Array]]:
    """Total loss, its gradient, metrics parts and term weights of a global batch, over its micro-batches.

    Every term is divided by its weight over the whole batch, so the result does not depend on how it is cut. `step` (of
    `num_steps`) is where schedules stand, and what random directions and dropout are drawn from. `frozen` are the
    parameters that there is no gradient by.
    """
    weights = term_weights(batch, config.objective)
    scales = term_scales(config.objective, step, num_steps)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    rest = Part(config, weights, scales, key, longest_segment, attention, len(batch.segments), frozen)
    if config.train.micro_batches == 1:
        (total, aux), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(params, batch, rest)
    else:
        total, grads, aux = _of_copies(params, batch, rest)
    return total, grads, aux, weights


def _of_copies(params: Any, batch: Batch, rest: Part) -> tuple[jax.Array, Any, dict[str, Any]]:
    """`_of_parts`, where every copy of the parameters takes its rows for itself: gradients are added up over copies
    once, behind the last micro-batch. XLA alone would do so in each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_copies = math.prod(mesh.shape[axis] for axis in REPLICAS) if not mesh.empty else 1
    if num_copies == 1:
        return _of_parts(params, batch, rest)

    def of_copy(params: Any, batch: Batch, number: jax.Array, weights: Any, scales: Any, key: Any, frozen: Any) -> Any:
        own = dict(weights=weights, scales=scales, key=jax.random.fold_in(key, number[0]), frozen=frozen)
        total, grads, aux = _of_parts(params, batch, dataclasses.replace(rest, **own))
        pairs = aux.pop("pairs")
        return jax.lax.psum((total, grads, aux), REPLICAS), pairs

    whole, cut = PartitionSpec(), PartitionSpec(REPLICAS)
    run = jax.shard_map(
        of_copy, in_specs=(whole, cut, cut, *(whole,) * 4), out_specs=(whole, cut), axis_names=set(REPLICAS),
        check_vma=False,
    )  # fmt: skip
    numbers = jnp.arange(num_copies)
    (total, grads, aux), pairs = run(params, batch, numbers, rest.weights, rest.scales, rest.key, rest.frozen)
    return total, grads, aux | {"pairs": pairs}


def _of_parts(params: Any, batch: Batch, rest: Part) -> tuple[jax.Array, Any, dict[str, Any]]:
    """Total loss, gradient and metrics parts of these rows, one micro-batch after the other."""
    config, parts = rest.config, rest.config.train.micro_batches

    def add(carry: tuple[jax.Array, Any, Any], part: tuple[Batch, Any]) -> tuple[tuple[jax.Array, Any, Any], Any]:
        rows, number = part
        (total, aux), sums = _add_gradients(params, carry[1], rows, dataclasses.replace(rest, micro_batch=number))
        pairs = aux.pop("pairs")
        total, aux = jax.tree.map(jnp.add, (carry[0], carry[2]), (total, aux))
        return (total, sums, aux), pairs

    split = _split(batch, parts)
    first = jax.tree.map(lambda x: x[0], split)
    aux = jax.eval_shape(lambda p, b: loss_and_aux(p, b, rest)[1], params, first)
    aux = {name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), aux[name]) for name in ("sums", "cos_sum")}
    zeros = (jnp.zeros((), jnp.float32), _zeros(params, config), aux)
    (total, grads, aux), pairs = jax.lax.scan(add, zeros, (split, jnp.arange(parts)))
    pairs = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(parts * x.shape[1], *x.shape[2:]), pairs)
    return total, grads, aux | {"pairs": pairs}


def _add_gradients(params: Any, sums: Any, part: Batch, rest: Part) -> tuple[tuple[jax.Array, Any], Any]:
    """Loss of one micro-batch, and the float32 sums with its gradients; those of whole layers are added in place."""
    if rest.frozen is not None:  # gradients of adapters are small
        value, grads = jax.value_and_grad(loss_and_aux, has_aux=True)(params, part, rest)
        return value, jax.tree.map(jnp.add, sums, jax.tree.map(_wide, grads))
    layers = {"layers": params["layers"]}
    others = {name: value for name, value in params.items() if name not in layers}

    def loss(others: Any, layer_sums: Any) -> tuple[jax.Array, dict[str, Any]]:
        return loss_and_aux(others | layers, part, rest, layer_sums)

    value, (grads, layer_sums) = jax.value_and_grad(loss, (0, 1), has_aux=True)(others, sums["layers"])
    added = jax.tree.map(jnp.add, {name: sums[name] for name in others}, jax.tree.map(_wide, grads))
    return value, added | {"layers": layer_sums}


def _zeros(params: Any, config: Config) -> Any:
    """float32 zeros that lie as the parameters do."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    if jax.sharding.get_abstract_mesh().empty:
        return zeros
    axes = abstract_parameters(config)[1]
    specs = jax.tree.map(parameter_spec, axes, is_leaf=is_axes)
    return jax.tree.map(jax.lax.with_sharding_constraint, zeros, specs)


def _wide(gradient: jax.Array) -> jax.Array:
    return gradient.astype(jnp.float32)


def _metrics(batch: Batch, aux: dict[str, Any], weights: dict[str, jax.Array]) -> dict[str, Any]:
    """Sums that the loop adds over a window of steps before dividing."""
    pairs = jnp.sum(batch.pair_weight)
    branch = (batch.tokens.shape[1] - batch.segments.shape[1]) // max(1, batch.pair_weight.shape[1])
    tokens = jnp.sum(batch.segments > 0, dtype=jnp.float32) + branch * pairs
    sums = {
        "target_tokens": jnp.sum(batch.target_weight),
        "pairs": pairs,
        "examples": jnp.sum(batch.num_examples, dtype=jnp.float32),
        "tokens": tokens,
        "slots": jnp.float32(batch.tokens.size),
        "cos_sum": aux["cos_sum"],
    }
    sums |= {f"{name}_sum": value for name, value in aux["sums"].items()}
    sums |= {f"{name}_weight": value for name, value in weights.items()}
    return {"sums": sums, "embeddings": aux["pairs"]}


def without_pairs(config: Config) -> Config:
    """The configuration of a step whose rows have no pair slots: every term that compares views is off."""
    objective = config.objective
    sections = {term.name: term.section(objective) for term in enabled(objective)}
    off = {
        name: dataclasses.replace(section, weight=0.0)
        for name, section in sections.items()
        if isinstance(section, JepaConfig | SpreadConfig)
    }
    return dataclasses.replace(config, objective=dataclasses.replace(objective, **off))


def make_train_step(
    factory: StateFactory, num_steps: int, longest_segment: int = 0
) -> Callable[[TrainState, Batch], tuple[TrainState, Any]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state passed in is donated.

    Compiled for a batch without pair slots, it is next-token training and costs no more.
    A non-finite loss or gradient norm leaves parameters and optimizer untouched and is counted.

    Raises:
        UserError: the mesh's devices do not run the attention back end that the configuration names.
    """
    config, optimizer, mesh = factory.config, factory.optimizer, factory.mesh
    platform, row_parts = mesh.devices.flat[0].platform, mesh.shape[LENGTH_AXIS]
    attention_backend(config, platform, config.data.row_length, row_parts)  # refuses now, not when the step is traced
    schedule = learning_rate(config.opt, num_steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, factory.abstract)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        attention = attention_backend(config, platform, batch.segments.shape[1], row_parts)
        run = config if batch.pair_weight.shape[1] else without_pairs(config)
        total, grads, aux, weights = gradients(
            state.params, batch, run, longest_segment, attention, state.step, num_steps, state.frozen
        )
        grads = jax.tree.map(jax.lax.with_sharding_constraint, grads, shardings.params)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        bad = 1 - finite.astype(jnp.int32)
        skipped_in_row = bad * (state.skipped_in_row + 1)
        new = TrainState(state.step + 1, params, opt_state, state.skipped + bad, skipped_in_row, state.frozen)
        metrics = _metrics(batch, aux, weights)
        metrics["last"] = {
            "total_loss": total,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),
            "skipped_steps": new.skipped,
            "skipped_in_row": new.skipped_in_row,
        }
        return new, metrics

    everywhere = replicated(mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, rows_sharding(mesh)),
        out_shardings=(shardings, everywhere),
        compiler_options=compiler_options(config, mesh),
    )
