# SPDX-License-Identifier: Apache-2.0
"""What families' `config.json` files are made of. A part reads keys of ours from fields, and writes them back.

Whether a family can say a model is found by writing and reading it again, so `write` need not check.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

from llm_jepa_jax.config import ModelConfig, RopeScalingConfig
from llm_jepa_jax.models.families.fields import Fields

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Published names to ours."""


class Part(Protocol):
    """One or more fields."""

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        """Keys of `ModelConfig`; `known` are those of the parts before.

        Raises:
            UserError: a field is missing, of another type, or not supported.
        """

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Fields."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A field that is a key of ours; where it is absent, `default`, or the key of ours that it names."""

    field: str
    key: str
    default: Any = ...
    null: Any = ...
    """What null stands for; else it is as if the field were absent."""
    written: type | None = None
    """The type that readers insist on, where it is not that of the key."""

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        default = known[self.default] if isinstance(self.default, str) else self.default
        return {self.key: fields.take(self.field, _types()[self.key], default, self.null)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        value = getattr(config, self.key)
        if self.written:
            value = self.written(value)
        return {self.field: None if value == self.null else value}


@dataclasses.dataclass(frozen=True)
class Flags:
    """A true or false field that stands for several keys of ours."""

    field: str
    keys: tuple[str, ...]
    default: bool = False

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(self.keys, fields.take(self.field, bool, self.default))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.field: getattr(config, self.keys[0])}


@dataclasses.dataclass(frozen=True)
class Switch:
    """A true or false field, false where it is absent, that stands for two values of a key of ours."""

    field: str
    key: str
    on: Any
    off: Any

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        return {self.key: self.on if fields.take(self.field, bool, False) else self.off}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.field: getattr(config, self.key) == self.on}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A field that must have one value, or be absent."""

    field: str
    value: Any

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        found = fields.take(self.field, type(self.value), self.value)
        if found != self.value:
            raise fields.refuse(self.field, found, f"use a model with {self.value!r}")
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class Activation:
    """The MLP's activation."""

    field: str = "hidden_act"
    default: str = "silu"
    known: Mapping[str, str] = dataclasses.field(default_factory=lambda: ACTIVATIONS)

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        name = fields.take(self.field, str, self.default)
        if name not in self.known:
            raise fields.refuse(self.field, name, f"known are {', '.join(self.known)}")
        return {"activation": self.known[name]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        names = (self.default, *ACTIVATIONS)
        return {self.field: next(name for name in names if ACTIVATIONS[name] == config.activation)}


@dataclasses.dataclass(frozen=True)
class HeadDim:
    """The width of a head, by default that of the model divided by its heads."""

    free: bool = True
    """The family has a field for another width."""

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        width = known["embed_dim"] // known["num_heads"]
        return {"head_dim": fields.take("head_dim", int, width) if self.free else width}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"head_dim": config.head_dim} if self.free else {}


SIZES: tuple[Part, ...] = (
    Value("vocab_size", "vocab_size"),
    Value("hidden_size", "embed_dim"),
    Value("intermediate_size", "mlp_dim"),
    Value("num_hidden_layers", "num_layers"),
    Value("num_attention_heads", "num_heads"),
    Value("num_key_value_heads", "num_kv_heads", "num_heads"),
    HeadDim(),
    Value("max_position_embeddings", "max_positions"),
    Value("initializer_range", "init_std", 0.02),
)
"""What every family has."""


REFUSED = {
    "dynamic": "its base follows the sequence's length, so packed segments and cached keys have no fixed angles",
    "longrope": "its frequencies change where a sequence gets long, so segments and cached keys have no fixed angles",
}
"""Types of scaling that exist, and why they are not here."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary settings in either spelling, `rope_parameters` or `rope_theta` with `rope_scaling`; both are written."""

    theta: float = 10000.0
    """The base where the file has none."""
    share: float = 1.0
    """The rotated share of a head where the file has none."""
    scaled: bool = True
    """Whether the family knows scaling as it is here."""

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        theta = fields.take("rope_theta", float, None)
        share = fields.take("partial_rotary_factor", float, None)
        old, new = fields.below("rope_scaling"), fields.below("rope_parameters")
        scaling, found = (read_scaling(section, known["max_positions"]) for section in (old, new))
        if found is not None:
            if scaling not in (None, found):
                raise fields.refuse("rope_parameters", "not what `rope_scaling` says", "make the two agree")
            scaling = found
        theta = _agreed(new, "rope_theta", theta)
        share = _agreed(new, "partial_rotary_factor", share)
        old.finish()
        new.finish()
        if scaling and not self.scaled and scaling.factor != 1.0:
            raise fields.refuse("rope_scaling", scaling.kind, "this family means another scaling by that name")
        if share is not None and self.share == 1.0 != share:
            raise fields.refuse("partial_rotary_factor", share, "heads of this family are rotated whole")
        return {
            "rope_theta": self.theta if theta is None else theta,
            "rope_share": self.share if share is None else share,
            "rope_scaling": scaling or RopeScalingConfig(),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaling, theta = write_scaling(config.rope_scaling), {"rope_theta": config.rope_theta}
        share = {"partial_rotary_factor": config.rope_share} if self.share != 1.0 else {}
        parameters = theta | share | (scaling or {"rope_type": "default"})
        return theta | share | {"rope_scaling": scaling, "rope_parameters": parameters}


def _agreed(fields: Fields, name: str, outside: float | None) -> float | None:
    """The value in `rope_parameters`, or that outside of it; they must be equal where there are both."""
    inside = fields.take(name, float, outside)
    if outside not in (None, inside):
        raise fields.refuse(name, inside, f"outside of this section it is {outside}")
    return inside


def read_scaling(fields: Fields, max_positions: int) -> RopeScalingConfig | None:
    """The scaling in `rope_scaling` or `rope_parameters`; None where it names none.

    Raises:
        UserError: a type of scaling that is not supported.
    """
    if "rope_type" not in fields and "type" not in fields:
        return None
    name = "rope_type" if "rope_type" in fields else "type"
    kind = fields.take(name, str)
    fields.take("type", str, "")
    if kind == "default":
        return RopeScalingConfig()
    if kind == "linear":
        return RopeScalingConfig("linear", fields.take("factor", float))
    if kind == "yarn":
        return _read_yarn(fields, max_positions)
    if kind != "llama3":
        raise fields.refuse(name, kind, REFUSED.get(kind, "known are default, linear, llama3 and yarn"))
    low, high = (fields.take(f"{end}_freq_factor", float) for end in ("low", "high"))
    positions = fields.take("original_max_position_embeddings", int)
    return RopeScalingConfig("llama3", fields.take("factor", float), low, high, positions)


def _read_yarn(fields: Fields, max_positions: int) -> RopeScalingConfig:
    """YaRN, with the factor of attention that `mscale` and `mscale_all_dim` give where they say it."""
    positions = fields.take("original_max_position_embeddings", int, max_positions)
    factor = fields.take("factor", float, max_positions / positions)
    fast, slow = fields.take("beta_fast", float, 32.0), fields.take("beta_slow", float, 1.0)
    attention, given = fields.take("attention_factor", float, 0.0), "attention_factor"
    scales = [fields.take(name, float, 0.0) for name in ("mscale", "mscale_all_dim")]
    if not attention and all(scales):
        over, under = (0.1 * scale * math.log(factor) + 1.0 for scale in scales)
        attention, given = over / under, "mscale"
    if attention < 0 or (factor == 1.0 and attention not in (0.0, 1.0)):
        raise fields.refuse(given, attention, "it is above 0, and goes with a `factor` above 1")
    truncate = fields.take("truncate", bool, True)
    return RopeScalingConfig(
        "yarn", factor, original_max_positions=positions, beta_fast=fast, beta_slow=slow, truncate=truncate,
        attention_factor=attention,
    )  # fmt: skip


def write_scaling(scaling: RopeScalingConfig) -> dict[str, Any] | None:
    """The fields of a scaling; None where there is none."""
    if scaling.factor == 1.0:
        return None
    values = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return values
    values |= {"original_max_position_embeddings": scaling.original_max_positions}
    if scaling.kind == "llama3":
        return values | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    return values | ({"attention_factor": scaling.attention_factor} if scaling.attention_factor else {})


TYPES = {"sliding_attention": "L", "full_attention": "G"}
"""Published names of layers to letters of `model.window_pattern`."""


@dataclasses.dataclass(frozen=True)
class LayerTypes:
    """Which layers have the window: `layer_types`, else the family's pattern. `SlidingWindow` parts go before."""

    pattern: str = "L"
    period_fields: tuple[str, ...] = ()
    """Fields that say how many layers a pattern has, of which the last is global."""
    first_field: str = ""
    """The field that says which layer is the first with a window."""
    first_default: int = 0

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        layers, pattern = known["num_layers"], self.pattern
        for name in self.period_fields:
            period = fields.take(name, int, None)
            pattern = pattern if period is None else "L" * (period - 1) + "G"
        first = fields.take(self.first_field, int, self.first_default) if self.first_field else 0
        letters = "G" * min(first, layers) + "".join(pattern[i % len(pattern)] for i in range(first, layers))
        types = fields.take("layer_types", list, [])
        for kind in types:
            if kind not in TYPES:
                raise fields.refuse("layer_types", kind, f"known are {', '.join(TYPES)}")
        if types and len(types) != layers:
            raise fields.refuse("layer_types", f"{len(types)} names", f"`num_hidden_layers` is {layers}")
        letters = "".join(TYPES[kind] for kind in types) or letters
        if not known["window"] or "L" not in letters:
            return {"window": 0, "window_pattern": "L"}
        return {"window_pattern": _shortest(letters)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        names, pattern = {letter: name for name, letter in TYPES.items()}, config.window_pattern
        letters = [pattern[i % len(pattern)] if config.window else "G" for i in range(config.num_layers)]
        return {"layer_types": [names[letter] for letter in letters]}


def _shortest(letters: str) -> str:
    """The shortest pattern that gives these letters when it is repeated."""
    sizes = range(1, len(letters) + 1)
    return next(letters[:size] for size in sizes if (letters[:size] * len(letters))[: len(letters)] == letters)


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """The window, and the field that turns it on where the family has one."""

    default: int = 4096
    switch: str = ""

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        on = fields.take(self.switch, bool, False) if self.switch else True
        window = fields.take("sliding_window", int, self.default, null=0)
        return {"window": window if on else 0}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        switch = {self.switch: config.window > 0} if self.switch else {}
        return switch | {"sliding_window": config.window or None}


def _types() -> dict[str, type]:
    return {field.name: type(field.default) for field in dataclasses.fields(ModelConfig)}
