# SPDX-License-Identifier: Apache-2.0
"""Checks of the keys of `model` among themselves; `resolve.py` has those that involve other sections."""

from llm_jepa_jax.config import BY_LAYER, ModelConfig, RopeScalingConfig
from llm_jepa_jax.errors import UserError

OF_KIND = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_positions"),
    "yarn": ("original_max_positions", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}
"""Keys of `model.rope_scaling` that each kind looks at."""


def fail(key: str, value: object, why: str) -> None:
    """Refuses the value of a key.

    Raises:
        UserError: always.
    """
    raise UserError(f"config: `{key}`={value} {why}")


def check_model(model: ModelConfig) -> None:
    """Refuses sizes that do not go together, and keys without effect.

    Raises:
        UserError: a contradiction, with the key, its value and the fix.
    """
    _check_layers(model)
    if model.head_dim % 2:
        fail("model.head_dim", model.head_dim, "is odd; rotary embeddings need an even width")
    _check_structure(model)
    _check_scaling(model.rope_scaling)


def _check_layers(model: ModelConfig) -> None:
    for by_layer, key in BY_LAYER.items():
        sizes = getattr(model, by_layer)
        if sizes and len(sizes) != model.num_layers:
            fail(f"model.{by_layer}", sizes, f"has {len(sizes)} sizes; `model.num_layers`={model.num_layers}")
        if sizes and min(sizes) < 1:
            fail(f"model.{by_layer}", sizes, "has a size below 1")
        if sizes and max(sizes) != getattr(model, key):
            most = max(sizes)
            fail(f"model.{key}", getattr(model, key), f"is not the most of `model.{by_layer}`={sizes}; set {most}")
    for number in range(model.num_layers):
        heads, kv_heads = model.layer(number).num_heads, model.layer(number).num_kv_heads
        if heads % kv_heads:
            where = "" if model.uniform else f" of layer {number}"
            fail("model.num_kv_heads", kv_heads, f"does not divide `model.num_heads`={heads}{where}")


def _check_structure(model: ModelConfig) -> None:
    if not model.window_pattern or set(model.window_pattern) - set("LG"):
        fail("model.window_pattern", repr(model.window_pattern), "is no pattern; use letters L and G, such as LG")
    if not model.window:
        for name in ("window_pattern", "local_rope_theta"):
            value = getattr(model, name)
            if value != getattr(ModelConfig(), name):
                fail(f"model.{name}", value, "has no effect with `model.window`=0; set the window, or leave it out")
    if model.block == "parallel" and model.norm_placement != "pre":
        fail("model.norm_placement", model.norm_placement, "is not for `model.block`=parallel; use pre")
    if int(model.head_dim * model.rope_share) % 2:
        fail("model.rope_share", model.rope_share, f"of `model.head_dim`={model.head_dim} is no even number of places")


def _check_scaling(scaling: RopeScalingConfig) -> None:
    if scaling.factor < 1:
        fail("model.rope_scaling.factor", scaling.factor, "is below 1; use 1 (off) or more")
    if scaling.factor == 1:
        return
    for key in {key for keys in OF_KIND.values() for key in keys} - set(OF_KIND[scaling.kind]):
        value = getattr(scaling, key)
        if value != getattr(RopeScalingConfig(), key):
            fail(f"model.rope_scaling.{key}", value, f"has no effect with `model.rope_scaling.kind`={scaling.kind}")
    if scaling.kind == "yarn" and not 0 < scaling.beta_slow < scaling.beta_fast:
        fail("model.rope_scaling.beta_slow", scaling.beta_slow, f"is not between 0 and `beta_fast`={scaling.beta_fast}")
    if scaling.attention_factor < 0:
        fail(
            "model.rope_scaling.attention_factor", scaling.attention_factor, "is negative; use 0 for that of the paper"
        )
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.kind == "llama3" and low >= high:
        fail("model.rope_scaling.low_freq_factor", low, f"is not below `model.rope_scaling.high_freq_factor`={high}")
