# SPDX-License-Identifier: Apache-2.0
"""Cross-field checks of a configuration: each failure names the key, its value and the fix."""

import dataclasses
import math
from collections.abc import Callable, Mapping

from llm_jepa_jax.batch import ROW_MULTIPLE, SHORTEST_ROW, row_lengths
from llm_jepa_jax.config import BY_LAYER, Config
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval_config import sampling_fault
from llm_jepa_jax.model_checks import check_model, fail
from llm_jepa_jax.objective_config import (
    NUM_RESERVED_PREDICTORS,
    ObjectiveConfig,
    SpreadConfig,
    StpConfig,
    VectorsConfig,
)
from llm_jepa_jax.resolve_lora import check_lora

TERMS = tuple(f.name for f in dataclasses.fields(ObjectiveConfig) if f.metadata.get("section"))
"""Sections of the objectives."""
SPREADS = tuple(term for term in TERMS if isinstance(getattr(ObjectiveConfig(), term), SpreadConfig))
POSITIVE = [
    "text.vocab_size",
    "model.vocab_multiple",
    "data.row_length",
    "data.rows_per_step",
    "data.prefetch",
    "data.synthetic_train",
    "data.synthetic_eval",
    "model.embed_dim",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.mlp_dim",
    "model.max_positions",
    "model.rope_theta",
    "model.norm_eps",
    "model.init_std",
    "model.rope_scaling.factor",
    "model.rope_share",
    "model.rope_scaling.original_max_positions",
    "objective.head_chunk",
    "objective.jepa.temperature",
    "objective.stp.temperature",
    "objective.stp.draws",
    "objective.sigreg.directions",
    "objective.sigreg.reach",
    "opt.learning_rate",
    "opt.eps",
    "train.micro_batches",
    "train.max_skipped",
    "train.profile_steps",
    "checkpoint.keep_last",
    "eval.max_new_tokens",
    "eval.num_examples",
    "eval.sql_seconds",
    "log.every_steps",
]
NOT_NEGATIVE = [
    "seed",
    "init.step",
    "data.target_slots",
    "data.pair_slots",
    "data.row_buckets",
    "data.workers",
    "model.vocab_size",
    "objective.ntp.weight",
    "objective.ntp.z_loss",
    "model.logit_soft_cap",
    "model.attention_soft_cap",
    "model.score_width",
    "model.local_rope_theta",
    "model.window",
    "objective.jepa.weight",
    "objective.jepa.view_end_offset",
    "objective.stp.weight",
    "objective.stp.max_length",
    "objective.vicreg.weight",
    "objective.vicreg.covariance",
    "objective.sigreg.weight",
    *(f"objective.{term}.{key}" for term in TERMS for key in ("min_weight", "schedule_steps")),
    "opt.warmup_steps",
    "opt.weight_decay",
    "opt.clip_norm",
    "train.num_steps",
    "train.num_epochs",
    "train.profile_start",
    "checkpoint.every_steps",
    "checkpoint.ahead_steps",
    "checkpoint.keep_best",
    "eval.batch_size",
    "eval.every_steps",
    "eval.final_examples",
    "log.report_pairs",
    "log.rank_floor",
    "log.std_floor",
]
SHARES = [
    "model.rope_share",
    "objective.vicreg.target_std",
    "data.eval_share",
    "data.max_dropped_share",
    "log.cos_ceiling",
    "objective.jepa.dropout",
    "opt.final_scale",
    "opt.beta1",
    "opt.beta2",
]

KERNEL_PLATFORM = {"splash": "tpu", "triton": "gpu"}
"""The devices that each attention kernel is for, by the name JAX gives their platform."""
KERNEL_HEAD_DIMS = {"splash": (64, 128, 256), "triton": (64, 128)}
KERNEL_BLOCK = 128
"""Rows are cut into blocks of this many tokens or a multiple."""


def resolve(config: Config, mesh_shape: Mapping[str, int]) -> Config:
    """The configuration after all cross-field checks that need no data, on a mesh of these sizes (an axis left out: 1).

    Raises:
        UserError: a contradiction, with the key, its value and the fix.
    """
    _check_ranges(config)
    _check_data(config)
    _check_objective(config)
    _check_schedules(config)
    _check_stp(config)
    _check_whole_batch(config)
    _check_train(config, mesh_shape)
    _check_model(config, mesh_shape)
    _check_context(config, mesh_shape.get("context", 1))
    _check_attention(config, config.data.row_length, mesh_shape.get("context", 1))
    check_lora(config, mesh_shape)
    _check_sampling(config)
    return config


def attention_backend(config: Config, platform: str, row_length: int, parts: int = 1) -> str:
    """The back end of a training step with rows of this length on this platform: `xla`, `splash` or `triton`. `parts`
    are those that a row is cut into (`mesh.context`).

    Raises:
        UserError: `train.attention` names one that cannot do it, with the reason and the fix.
    """
    name = config.train.attention
    if name == "auto":
        kernels = [kernel for kernel, wanted in KERNEL_PLATFORM.items() if wanted == platform]
        return next((kernel for kernel in kernels if not _refusal(kernel, config, row_length, parts)), "xla")
    if name != "xla" and platform != KERNEL_PLATFORM[name]:
        fail("train.attention", name, f"runs on {KERNEL_PLATFORM[name]} devices, not on {platform}; use auto or xla")
    _check_attention(config, row_length, parts)
    return name


def attention_refusal(
    backend: str,
    length: int,
    head_dim: int,
    dtype: str,
    window: int = 0,
    soft_cap: float = 0.0,
    parts: int = 1,
) -> str:
    """Why an attention kernel cannot do these rows, with the fix; empty where it can. `window`, `soft_cap` 0: off;
    `parts`: those that a row is cut into (`mesh.context`).
    """
    this, instead = f"`train.attention`={backend}", "or use train.attention=xla"
    if head_dim not in KERNEL_HEAD_DIMS[backend]:
        return f"{this} takes `model.head_dim` of {_either(KERNEL_HEAD_DIMS[backend])}, not {head_dim}; {instead[3:]}"
    unit = KERNEL_BLOCK * parts
    if length % unit:
        over = f" over `mesh.context`={parts}" if parts > 1 else ""
        fits = -(-length // unit) * unit
        return f"{this} takes `data.row_length` in multiples of {unit}{over}, not {length}; set {fits}, {instead}"
    if backend == "triton" and parts > 1:
        return f"{this} takes whole rows, not `mesh.context`={parts}; use mesh.context=1, {instead}"
    if backend == "triton" and dtype != "bfloat16":
        # Its float32 products round their inputs to TF32.
        return f"{this} computes in bfloat16, not {dtype}; set train.dtype=bfloat16, {instead}"
    if backend == "triton" and (window or soft_cap):
        return f"{this} has no attention windows or soft caps; {instead[3:]}"
    return ""


def _either(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values[:-1]) + f" or {values[-1]}"


def _refusal(backend: str, config: Config, row_length: int, parts: int) -> str:
    model = config.model
    return attention_refusal(
        backend, row_length, model.head_dim, config.train.dtype, model.window, model.attention_soft_cap, parts
    )


def _check_context(config: Config, parts: int) -> None:
    """Rows of every length that a run may have are cut into equal parts."""
    data = config.data
    for length in row_lengths(data.row_length)[: data.row_buckets or None]:
        if length % parts:
            fewer = "" if length == data.row_length else ", or data.row_buckets=1"
            fail("mesh.context", parts, f"does not divide rows of {length} tokens; use a divisor of it{fewer}")


def _check_attention(config: Config, row_length: int, parts: int) -> None:
    if config.train.attention in KERNEL_PLATFORM:
        refusal = _refusal(config.train.attention, config, row_length, parts)
        if refusal:
            raise UserError(f"config: {refusal}")


def _check_ranges(config: Config) -> None:
    rules: tuple[tuple[list[str], Callable[[float], bool], str], ...] = (
        (POSITIVE, lambda value: value > 0, "must be above 0"),
        (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
        (SHARES, lambda value: 0 <= value <= 1, "must lie between 0 and 1"),
    )
    for keys, holds, why in rules:
        for key in keys:
            value = _get(config, key)
            if not holds(value):
                fail(key, value, why)


def _get(config: Config, key: str) -> float:
    node: object = config
    for name in key.split("."):
        node = getattr(node, name)
    return node  # type: ignore[return-value]


def _check_data(config: Config) -> None:
    data, jepa = config.data, config.objective.jepa
    if not data.train:
        fail("data.train", "''", "names no data; use `synthetic` or JSONL files")
    if not data.eval and data.train != "synthetic" and not 0 < data.eval_share < 1:
        fail("data.eval_share", data.eval_share, "leaves no split; use a share between 0 and 1, or set `data.eval`")
    if data.row_length > config.model.max_positions and data.layout == "padded":
        fail(
            "data.row_length", data.row_length, f"is above `model.max_positions`={config.model.max_positions}; lower it"
        )
    for key, slots in (("data.target_slots", data.target_slots), ("data.pair_slots", data.pair_slots)):
        if slots > data.row_length:
            fail(key, slots, f"is above `data.row_length`={data.row_length}; use 0 to size it from the data")
        if slots and data.row_buckets > 1:
            fail(key, slots, f"is for one row length, not `data.row_buckets`={data.row_buckets}; use row_buckets=1")
    most = len(row_lengths(data.row_length))
    if data.row_buckets > most:
        fail(
            "data.row_buckets", data.row_buckets,
            f"halves `data.row_length`={data.row_length} below {SHORTEST_ROW} tokens or a multiple of {ROW_MULTIPLE}; "
            f"use at most {most}",
        )  # fmt: skip
    if data.layout == "shared" and jepa.source == "text" and jepa.placement == "prepend" and jepa.weight:
        fail(
            "objective.jepa.placement", "prepend",
            "puts predictor tokens before the text, which `data.layout`=shared has read without them; "
            "use data.layout=separate",
        )  # fmt: skip


def _check_objective(config: Config) -> None:
    ntp, jepa = config.objective.ntp, config.objective.jepa
    if not 0 <= jepa.num_predictors <= NUM_RESERVED_PREDICTORS:
        fail(
            "objective.jepa.num_predictors", jepa.num_predictors, f"is out of range; use 0 to {NUM_RESERVED_PREDICTORS}"
        )
    objective = config.objective
    if not any(getattr(objective, term).weight for term in TERMS):
        fail("objective.ntp.weight", 0, "and all other weights 0 leave no loss; set one of them above 0")
    spread = any(getattr(objective, term).weight for term in SPREADS)
    if ntp.weight == 0 and not spread and not _contrasts(jepa):
        fail(
            "objective.ntp.weight", 0,
            "lets the embeddings collapse: what is left has a constant solution; use a weight above 0, "
            "or add `objective.sigreg.weight` or `objective.vicreg.weight`, or `objective.jepa.distance`=infonce",
        )  # fmt: skip
    for term in SPREADS:
        if getattr(objective, term).weight and not jepa.weight:
            fail(
                f"objective.{term}.weight", getattr(objective, term).weight,
                "has no views; set `objective.jepa.weight` above 0",
            )  # fmt: skip
    if objective.sigreg.knots < 2:
        fail("objective.sigreg.knots", objective.sigreg.knots, "makes no integral; use 2 or more")
    layers = config.model.num_layers
    for term in ("jepa", "stp"):
        layer = getattr(objective, term).layer
        if not -layers - 1 <= layer <= layers:
            fail(f"objective.{term}.layer", layer, f"is no layer of `model.num_layers`={layers}; use 0 to {layers}")


def _check_schedules(config: Config) -> None:
    for term in TERMS:
        section = getattr(config.objective, term)
        key = f"objective.{term}.min_weight"
        if section.schedule == "constant" and (section.min_weight or section.schedule_steps):
            fail(
                key if section.min_weight else f"objective.{term}.schedule_steps",
                section.min_weight or section.schedule_steps,
                f"has no effect with `objective.{term}.schedule`=constant; use linear",
            )
        if section.schedule == "linear" and not section.weight:
            fail(f"objective.{term}.schedule", "linear", f"rises to `objective.{term}.weight`=0, which is off")
        if section.min_weight > section.weight:
            fail(key, section.min_weight, f"is above `objective.{term}.weight`={section.weight}; use less")


def _check_stp(config: Config) -> None:
    """Keys that a mode of STP has no use for stay at their defaults."""
    stp, plain = config.objective.stp, StpConfig()
    if not stp.weight:
        return
    spans = ("draw", "from_start", "max_length", "across_turns", "whole_conversation")
    unused: tuple[str, ...] = ()
    if stp.mode != "random_span":
        unused = ("draws", "length_weighting")
    if stp.mode in ("e2e", "mean", "curvature"):
        unused += spans
    if stp.mode == "curvature":
        unused += ("distance", "linear_predictor")
    for name in unused:
        value = getattr(stp, name)
        if value != getattr(plain, name):
            fail(f"objective.stp.{name}", value, f"has no effect with `objective.stp.mode`={stp.mode}; leave it out")


def _check_whole_batch(config: Config) -> None:
    """Terms that relate the pairs of a step to each other cannot be cut into micro-batches."""
    objective, parts = config.objective, config.train.micro_batches
    terms = [(f"objective.{t}.weight", getattr(objective, t).weight) for t in SPREADS]
    for term in ("jepa", "stp"):
        section = getattr(objective, term)
        terms.append((f"objective.{term}.distance", section.distance if _contrasts(section) else ""))
    for key, value in terms:
        if value and parts > 1:
            fail(key, value, f"needs all pairs of a step at once, but `train.micro_batches`={parts}; use 1")


def _contrasts(section: VectorsConfig) -> bool:
    return bool(section.weight) and section.distance == "infonce"


def _check_train(config: Config, mesh_shape: Mapping[str, int]) -> None:
    train, rows = config.train, config.data.rows_per_step
    if not train.num_steps and not train.num_epochs:
        fail("train.num_steps", 0, "and `train.num_epochs`=0 leave nothing to do; set one of them")
    every, ahead = config.checkpoint.every_steps, config.checkpoint.ahead_steps
    if every and ahead >= every:
        fail("checkpoint.ahead_steps", ahead, f"is not below `checkpoint.every_steps`={every}; use less")
    shards = math.prod(mesh_shape.get(axis, 1) for axis in ("slice", "data", "fsdp"))
    unit = shards * train.micro_batches
    if rows % unit:
        fail(
            "data.rows_per_step", rows,
            f"does not divide into {train.micro_batches} micro-batches over {shards} devices of slice, data and fsdp; "
            f"use a multiple of {unit}, such as {-(-rows // unit) * unit}",
        )  # fmt: skip


def _check_sampling(config: Config) -> None:
    fault = sampling_fault(config.eval.temperature, config.eval.top_k, config.eval.top_p)
    if fault:
        name, value, why = fault
        fail(f"eval.{name}", value, why)


def _check_model(config: Config, mesh_shape: Mapping[str, int]) -> None:
    model, tensor = config.model, mesh_shape.get("tensor", 1)
    fsdp, context = mesh_shape.get("fsdp", 1), mesh_shape.get("context", 1)
    check_model(model)
    for by_layer, name in BY_LAYER.items():
        for size in getattr(model, by_layer) or (getattr(model, name),):
            if size % tensor:
                fail("mesh.tensor", tensor, f"does not divide `model.{name}`={size}; use a divisor of it")
    if model.embed_dim % (fsdp * context):
        over = f"times `mesh.context`={context} " if context > 1 else ""
        fail("mesh.fsdp", fsdp, f"{over}does not divide `model.embed_dim`={model.embed_dim}; use a divisor of it")
