# SPDX-License-Identifier: Apache-2.0
"""Linen modules of the Llama decoder: they declare parameters and call pure functions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.models.attention.dense import attend_masked
from llm_jepa_jax.models.attention.dispatch import attend_rows
from llm_jepa_jax.models.ops import apply_rotary, linear, rms_norm, swiglu
from llm_jepa_jax.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of N layers, B prompts, S slots; every prompt writes the same slot."""

    key_NxBxSxKxh: Any
    value_NxBxSxKxh: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Which tokens of R rows may see each other; `batch.Batch` says what the arrays mean."""

    segments_RxL: Any
    branch_end_RxP: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Where a decode step writes and what it may read."""

    slot: Any
    """int32 scalar: the cache slot of the new token."""
    allowed_BxS: Any
    """bool: the slots each prompt may attend to, the new one included."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What goes from block to block."""

    hidden_RxLxD: Any
    cache: Cache | None
    layer: Any
    """int32 scalar: blocks behind."""
    states: tuple[Any, ...]
    """Hidden states of the layers that are wanted, [R, L, D] each; 0 up to there."""


class LlamaModule(nn.Module):
    """A module that knows the configuration and how to declare a parameter."""

    config: ModelConfig
    param_dtype: Any

    def weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], depth_scaled: bool = False) -> jax.Array:
        """A normal weight; `depth_scaled` divides its deviation by sqrt(2 N), for what adds to the residual stream."""
        deviation = self.config.init_std * ((2 * self.config.num_layers) ** -0.5 if depth_scaled else 1.0)
        init = nn.with_logical_partitioning(nn.initializers.normal(deviation), axes)
        return self.param(name, init, shape, self.param_dtype)

    def norm_scale(self, name: str) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        return self.param(name, init, (self.config.embed_dim,), self.param_dtype)

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.norm_scale(name), self.config.norm_eps)


class Block(LlamaModule):
    """One decoder block: pre-norm attention and SwiGLU."""

    attention: str = "xla"
    """The back end of whole rows; a decode step has its own."""
    longest_segment: int = 0
    """No segment is longer (0: not known): attention need not look further back."""
    keep_kv: bool = False
    """Return this block's keys and values (prefill)."""
    wanted: tuple[int, ...] = ()
    """The layers of `Carry.states`."""

    @nn.compact
    def __call__(
        self, carry: Carry, tables: Any, layout: Layout | None, decoding: Decoding | None
    ) -> tuple[Carry, Any]:
        hidden_RxLxD, cache, layer = carry.hidden_RxLxD, carry.cache, carry.layer
        with jax.named_scope("attention"):
            mixed, cache, kept = self._attention(hidden_RxLxD, cache, layer, tables, layout, decoding)
            hidden_RxLxD = constrain(hidden_RxLxD + mixed, "rows", "length", "embed")
        with jax.named_scope("mlp"):
            hidden_RxLxD = constrain(hidden_RxLxD + self._mlp(hidden_RxLxD), "rows", "length", "embed")
        states = (
            jnp.where(layer + 1 == number, hidden_RxLxD, state)
            for number, state in zip(self.wanted, carry.states, strict=True)
        )
        return Carry(hidden_RxLxD, cache, layer + 1, tuple(states)), kept

    def _attention(
        self, hidden_RxLxD: Any, cache: Any, layer: Any, tables: Any, layout: Any, decoding: Decoding | None
    ) -> tuple[Any, Any, Any]:
        config, dtype = self.config, hidden_RxLxD.dtype
        embed, heads, kv_heads, width = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        normed = self.norm("attention_norm", hidden_RxLxD)
        with jax.named_scope("qkv"):
            query = self.weight("query", (embed, heads, width), ("embed", "heads", "head_dim"))
            key = self.weight("key", (embed, kv_heads, width), ("embed", "kv_heads", "head_dim"))
            value = self.weight("value", (embed, kv_heads, width), ("embed", "kv_heads", "head_dim"))
            query_RxLxHxh = linear(normed, query.astype(dtype))
            key_RxLxKxh = linear(normed, key.astype(dtype))
            value_RxLxKxh = linear(normed, value.astype(dtype))
            query_RxLxHxh = constrain(query_RxLxHxh, "rows", "length", "heads", "head_dim")
        with jax.named_scope("rope"):
            query_RxLxHxh, key_RxLxKxh = apply_rotary(query_RxLxHxh, tables), apply_rotary(key_RxLxKxh, tables)
        if decoding is None:
            arrays = (query_RxLxHxh, key_RxLxKxh, value_RxLxKxh)
            mixed_RxLxHxh = attend_rows(
                *arrays, layout.segments_RxL, layout.branch_end_RxP, self.attention, self.longest_segment
            )
        else:
            cache = _write(cache, layer, decoding.slot, key_RxLxKxh, value_RxLxKxh)
            keys, values = cache.key_NxBxSxKxh[layer], cache.value_NxBxSxKxh[layer]
            mixed_RxLxHxh = attend_masked(query_RxLxHxh, keys, values, decoding.allowed_BxS[:, None, :])
        with jax.named_scope("out"):
            out = self.weight("out", (heads, width, embed), ("heads", "head_dim", "embed"), depth_scaled=True)
            mixed_RxLxD = linear(mixed_RxLxHxh, out.astype(dtype))
        return mixed_RxLxD, cache, (key_RxLxKxh, value_RxLxKxh) if self.keep_kv else None

    def _mlp(self, hidden_RxLxD: Any) -> Any:
        config, dtype = self.config, hidden_RxLxD.dtype
        normed = self.norm("mlp_norm", hidden_RxLxD)
        gate = self.weight("gate", (config.embed_dim, config.mlp_dim), ("embed", "mlp"))
        up = self.weight("up", (config.embed_dim, config.mlp_dim), ("embed", "mlp"))
        down = self.weight("down", (config.mlp_dim, config.embed_dim), ("mlp", "embed"), depth_scaled=True)
        inner = swiglu(linear(normed, gate.astype(dtype)), linear(normed, up.astype(dtype)))
        return linear(constrain(inner, "rows", "length", "mlp"), down.astype(dtype))


def _write(cache: Cache, layer: Any, slot: Any, key_Bx1xKxh: Any, value_Bx1xKxh: Any) -> Cache:
    """Puts one token's keys and values of one layer at `slot`; in place inside a jitted loop."""
    start = (layer, 0, slot, 0, 0)
    return Cache(
        jax.lax.dynamic_update_slice(cache.key_NxBxSxKxh, key_Bx1xKxh[None], start),
        jax.lax.dynamic_update_slice(cache.value_NxBxSxKxh, value_Bx1xKxh[None], start),
    )
