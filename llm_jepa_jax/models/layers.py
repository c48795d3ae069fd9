# SPDX-License-Identifier: Apache-2.0
"""Linen modules of the decoder: they declare parameters and call pure functions; `ModelConfig` says what is in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.models.attention.dense import attend_masked
from llm_jepa_jax.models.attention.dispatch import attend_rows
from llm_jepa_jax.models.attention.xla import attend, seen_back
from llm_jepa_jax.models.ops import (
    ACTIVATIONS,
    AGAIN,
    HIDDEN,
    PRODUCT,
    Adapter,
    Tables,
    adapter_names,
    apply_rotary,
    fenced,
    layer_norm,
    linear,
    rms_norm,
    with_fenced_gradients,
)
from llm_jepa_jax.models.quantized import Quantized, Weight
from llm_jepa_jax.models.weaving import join, split
from llm_jepa_jax.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of N layers, B prompts, S slots; every prompt writes the same slot."""

    key_NxBxSxKxh: Any
    value_NxBxSxKxh: Any
    first: int = dataclasses.field(default=0, metadata={"static": True})
    """Its first layer; layers of different shapes have a cache of their own each."""

    def write(self, layer: Any, slot: Any, key_Bx1xKxh: Any, value_Bx1xKxh: Any) -> "Cache":
        """With one token's keys and values of one layer at `slot`; in place inside a jitted loop."""
        start = (layer - self.first, 0, slot, 0, 0)
        return Cache(
            jax.lax.dynamic_update_slice(self.key_NxBxSxKxh, key_Bx1xKxh[None], start),
            jax.lax.dynamic_update_slice(self.value_NxBxSxKxh, value_Bx1xKxh[None], start),
            self.first,
        )

    def read(self, layer: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, [B, S, K, h] each."""
        return self.key_NxBxSxKxh[layer - self.first], self.value_NxBxSxKxh[layer - self.first]

    def lead(self, layer: Any, padding_R: Any, *own: jax.Array) -> list[jax.Array]:
        """A layer's arrays of R prompts [R, S, K, h] (keys, values) behind those of the prefix that this cache holds
        for all of them, [R, P + S, K, h]: padding, prefix, and what the prompts have of their own, without a gap.

        The first P places and those of padding in `own` are overwritten. The B prompts of the cache hold the same
        prefix, each for as many prompts as the others: one for each device that has rows.
        """
        length = self.key_NxBxSxKxh.shape[2]
        place_RxT = jnp.arange(length + own[0].shape[1]) - padding_R[:, None]
        index_RxTx1x1 = jnp.clip(place_RxT, 0, length - 1)[..., None, None]
        in_prefix_RxTx1x1 = ((place_RxT >= 0) & (place_RxT < length))[..., None, None]
        led = []
        for kept, array in zip(self.read(layer), own, strict=True):
            prefix_RxPxKxh = jnp.repeat(kept, len(array) // len(kept), axis=0)
            moved = jnp.take_along_axis(prefix_RxPxKxh, index_RxTx1x1, axis=1)
            led.append(jnp.where(in_prefix_RxTx1x1, moved, jnp.pad(array, ((0, 0), (length, 0), (0, 0), (0, 0)))))
        return led


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Which tokens of R rows may see each other; `batch.Batch` says what the arrays mean."""

    segments_RxL: Any
    """With a cached prefix (see `Cache.lead`) those of [R, P + S]: padding in front, 1 behind it."""
    branch_end_RxP: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Where a decode step writes and what it may read."""

    slot: Any
    """int32 scalar: the cache slot of the new token."""
    allowed_BxS: Any
    """bool: the slots each prompt may attend to, the new one included."""

    def allowed(self, seen: Any) -> jax.Array:
        """bool [B, S]: those of a layer that sees so many tokens back, its own included; None: all."""
        if seen is None:
            return self.allowed_BxS
        return self.allowed_BxS & (self.slot - jnp.arange(self.allowed_BxS.shape[1]) < seen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What goes from block to block."""

    hidden_RxLxD: Any
    cache: Any
    """A `Cache`, or a tuple of one for each layer where layers differ in shape."""
    layer: Any
    """int32 scalar: blocks behind."""
    states: tuple[Any, ...]
    """Hidden states of the layers that are wanted, [R, L, D] each; 0 up to there."""


class DecoderModule(nn.Module):
    """A module that knows the configuration and how to declare a parameter."""

    config: ModelConfig
    param_dtype: Any
    dropout: float = dataclasses.field(default=0.0, kw_only=True)
    """Share of the inputs of adapters that are dropped, where there is a random key `dropout`."""

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        depth_scaled: bool = False,
        zeros_behind: tuple[int, ...] = (),
    ) -> Weight:
        """A normal weight; `depth_scaled` divides its deviation by sqrt(2 N), for what adds to the residual stream.

        `zeros_behind` is padding behind each axis, which changes nothing of what is drawn. A quantised weight comes as
        it is: it was made elsewhere.
        """
        if self.has_variable("params", name) and isinstance(self.get_variable("params", name), Quantized):
            return self.get_variable("params", name)
        deviation = self.config.init_std * ((2 * self.config.num_layers) ** -0.5 if depth_scaled else 1.0)
        normal = nn.initializers.normal(deviation)

        def draw(key: jax.Array, dtype: Any) -> jax.Array:
            drawn = normal(key, shape, dtype)
            return jnp.pad(drawn, [(0, zeros) for zeros in zeros_behind]) if any(zeros_behind) else drawn

        return self.param(name, nn.with_logical_partitioning(draw, axes), self.param_dtype)

    def vector(self, name: str, shape: tuple[int, ...], axis: str, value: float) -> jax.Array:
        """A small parameter that begins with one value and lies whole on every device; `axis` is `norm` or `bias`."""
        axes = (axis, *("head_dim",) * (len(shape) - 1))
        init = nn.with_logical_partitioning(nn.initializers.constant(value), axes)
        return self.param(name, init, shape, self.param_dtype)

    def norm(self, name: str, *shape: int) -> Callable[[jax.Array], jax.Array]:
        """Declares a norm over the last axes, of this shape."""
        config, plus_one = self.config, self.config.norm == "rms_plus_one"
        scale = self.vector(name, shape, "norm", 0.0 if plus_one else 1.0)
        if config.norm == "layer":
            bias = self.vector(f"{name}_bias", shape, "norm", 0.0)
            return lambda x: layer_norm(x, scale, bias, config.norm_eps)
        return lambda x: rms_norm(x, 1.0 + scale.astype(jnp.float32) if plus_one else scale, config.norm_eps)

    def linear(
        self,
        name: str,
        x: jax.Array,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        bias: bool,
        depth_scaled: bool = False,
        kept_as: str = PRODUCT,
    ) -> jax.Array:
        """A linear layer in the type of `x`, over all axes `x` has behind [R, L]; `kept_as`: its name for remat."""
        weight = self.weight(name, shape, axes, depth_scaled)
        weight = weight if isinstance(weight, Quantized) else weight.astype(x.dtype)
        out = linear(x, weight, self._adapter(name, x), kept_as)
        if not bias:
            return out
        return out + self.vector(f"{name}_bias", shape[x.ndim - 2 :], "bias", 0.0).astype(x.dtype)

    def _adapter(self, name: str, x: jax.Array) -> Adapter | None:
        """That of a linear layer, if the parameters have one; dropout where there is a key for it."""
        names = adapter_names(name)
        if not self.has_variable("params", names[0]):
            return None
        a, b, scale = (self.get_variable("params", part).astype(x.dtype) for part in names)
        if self.dropout and self.has_rng("dropout"):
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1.0 - self.dropout), 0.0).astype(x.dtype)
        return Adapter(x, a, b, scale)


class Block(DecoderModule):
    """One decoder block: attention, then an MLP that reads what attention gave, each with norms around it."""

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
        hidden_RxLxD = carry.hidden_RxLxD
        with jax.named_scope("attention"):
            normed = self._before("attention_norm", hidden_RxLxD)
            mixed, cache, kept = self._attention(normed, carry, tables, layout, decoding)
            mixed = self._after("attention_post_norm", mixed)
            hidden_RxLxD = constrain(hidden_RxLxD + mixed, "rows", "length", "embed")
        with jax.named_scope("mlp"):
            inner = self._after("mlp_post_norm", self._mlp(self._before("mlp_norm", hidden_RxLxD)))
            hidden_RxLxD = constrain(hidden_RxLxD + inner, "rows", "length", "embed")
        return self._carried(carry, hidden_RxLxD, cache), kept

    @property
    def _on_tpu(self) -> bool:
        """TPUs have their own kernel of attention, and want other forms of the same arithmetic around it."""
        return self.attention == "splash"

    def _before(self, name: str, x: jax.Array) -> jax.Array:
        """What products read: the norm of `x`, where norms come first."""
        normed = x if self.config.norm_placement == "post" else self.norm(name, x.shape[-1])(x)
        return fenced(normed) if self._on_tpu else normed

    def _after(self, name: str, x: jax.Array) -> jax.Array:
        return x if self.config.norm_placement == "pre" else self.norm(name, x.shape[-1])(x)

    def _carried(self, carry: Carry, hidden_RxLxD: jax.Array, cache: Cache | None) -> Carry:
        behind = carry.layer + 1
        states = (
            jnp.where(behind == number, hidden_RxLxD, state)
            for number, state in zip(self.wanted, carry.states, strict=True)
        )
        return Carry(hidden_RxLxD, cache, behind, tuple(states))

    def _attention(
        self, normed_RxLxD: jax.Array, carry: Carry, tables: Any, layout: Any, decoding: Decoding | None
    ) -> tuple[Any, Any, Any]:
        config, windowed = self.config, _windowed(self.config, carry.layer)
        query_RxLxHxh, key_RxLxKxh, value_RxLxKxh = self._projected(normed_RxLxD)
        with jax.named_scope("rope"):
            chosen, trunk = _tables_of(tables, windowed), layout.segments_RxL.shape[1] if self._on_tpu else 0
            query_RxLxHxh, key_RxLxKxh = (
                rotated(array, chosen, trunk, self._kept[1]) for array in (query_RxLxHxh, key_RxLxKxh)
            )
        if config.score_width:
            query_RxLxHxh = query_RxLxHxh * (config.head_dim / config.score_width) ** 0.5
        cache, cap = carry.cache, config.attention_soft_cap
        if decoding is None and cache is not None:
            padding_R = jnp.sum(layout.segments_RxL == 0, axis=1)
            key_RxLxKxh, value_RxLxKxh = cache.lead(carry.layer, padding_R, key_RxLxKxh, value_RxLxKxh)
            mixed_RxLxHxh = attend(
                query_RxLxHxh, key_RxLxKxh, value_RxLxKxh, layout.segments_RxL,
                window=config.window, soft_cap=cap, windowed=windowed,
            )  # fmt: skip
        elif decoding is None:
            mixed_RxLxHxh = attend_rows(
                query_RxLxHxh, key_RxLxKxh, value_RxLxKxh, layout.segments_RxL, layout.branch_end_RxP,
                self.attention, self.longest_segment, config.window, cap, windowed,
            )  # fmt: skip
        else:
            cache = cache.write(carry.layer, decoding.slot, key_RxLxKxh, value_RxLxKxh)
            keys, values = cache.read(carry.layer)
            allowed_Bx1xS = decoding.allowed(seen_back(config.window, windowed))[:, None, :]
            mixed_RxLxHxh = attend_masked(query_RxLxHxh, keys, values, allowed_Bx1xS, cap)
        shape = (config.num_heads, config.head_dim, config.embed_dim)
        with jax.named_scope("out"):
            mixed_RxLxD = self.linear(
                "out", mixed_RxLxHxh, shape, ("heads", "head_dim", "embed"), config.out_bias, depth_scaled=True
            )
        return mixed_RxLxD, cache, (key_RxLxKxh, value_RxLxKxh) if self.keep_kv else None

    @property
    def _kept(self) -> tuple[str, str]:
        """Names for remat of queries' and keys' products, and of their rotations. A rotation's backward pass reads
        neither, attention's the rotation; a norm's between them reads the product.
        """
        return (AGAIN, PRODUCT) if self.config.qk_norm == "none" else (PRODUCT, AGAIN)

    def _projected(self, normed_RxLxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, before the rotation."""
        config, arrays = self.config, {}
        kinds = (("query", config.num_heads, "heads"), ("key", config.num_kv_heads, "kv_heads"))
        with jax.named_scope("qkv"):
            for name, heads, axis in (*kinds, ("value", config.num_kv_heads, "kv_heads")):
                shape, axes = (config.embed_dim, heads, config.head_dim), ("embed", axis, "head_dim")
                kept = PRODUCT if name == "value" else self._kept[0]
                arrays[name] = self.linear(name, normed_RxLxD, shape, axes, config.qkv_bias, kept_as=kept)
            arrays["query"] = constrain(arrays["query"], "rows", "length", "heads", "head_dim")
        if config.qk_norm != "none":
            for name, heads, _ in kinds:
                together = (heads,) if config.qk_norm == "full" else ()
                arrays[name] = self.norm(f"{name}_norm", *together, config.head_dim)(arrays[name])
        return arrays["query"], arrays["key"], arrays["value"]

    def _mlp(self, normed_RxLxD: jax.Array) -> jax.Array:
        config = self.config
        act, bias, shape = ACTIVATIONS[config.activation], config.mlp_bias, (config.embed_dim, config.mlp_dim)
        if config.mlp_gated:
            gate, up = (
                self.linear(name, normed_RxLxD, shape, ("embed", "mlp"), bias, kept_as=HIDDEN)
                for name in ("gate", "up")
            )
            if self._on_tpu:
                gate, up = with_fenced_gradients((gate, up))
            inner = act(gate) * up
        else:
            inner = act(self.linear("up", normed_RxLxD, shape, ("embed", "mlp"), bias, kept_as=HIDDEN))
        inner = constrain(inner, "rows", "length", "mlp")
        return self.linear("down", inner, shape[::-1], ("mlp", "embed"), bias, depth_scaled=True)


class ParallelBlock(Block):
    """Attention and an MLP that read the same norm, both added to the residual stream."""

    @nn.compact
    def __call__(
        self, carry: Carry, tables: Any, layout: Layout | None, decoding: Decoding | None
    ) -> tuple[Carry, Any]:
        normed = self._before("norm", carry.hidden_RxLxD)
        with jax.named_scope("attention"):
            mixed, cache, kept = self._attention(normed, carry, tables, layout, decoding)
        with jax.named_scope("mlp"):
            hidden_RxLxD = carry.hidden_RxLxD + mixed + self._mlp(normed)
        return self._carried(carry, constrain(hidden_RxLxD, "rows", "length", "embed"), cache), kept


BLOCKS = {"sequential": Block, "parallel": ParallelBlock}
"""By `model.block`."""


class SeparateLayers(Block):
    """Blocks of different shapes, one after the other; the parameters and the cache of each are its own."""

    block: Any = None
    """Their class."""

    @nn.compact
    def __call__(
        self, carry: Carry, tables: Any, layout: Layout | None, decoding: Decoding | None
    ) -> tuple[Carry, list[Any]]:
        kept, caches = [], []
        rest = self.param_dtype, self.attention, self.longest_segment, self.keep_kv, self.wanted
        for number in range(self.config.num_layers):
            block = self.block(self.config.layer(number), *rest, name=str(number))
            own = carry.cache and carry.cache[number]
            after, arrays = block(dataclasses.replace(carry, cache=own), tables, layout, decoding)
            carry = dataclasses.replace(after, cache=carry.cache)
            caches.append(after.cache)
            kept.append(arrays)
        return dataclasses.replace(carry, cache=carry.cache and tuple(caches)), kept


def _windowed(config: ModelConfig, layer: jax.Array) -> jax.Array | None:
    """bool scalar: whether this layer has the window; None where all layers do alike."""
    pattern = config.window_pattern
    if not config.window or "G" not in pattern:
        return None
    local_N = np.array([pattern[i % len(pattern)] == "L" for i in range(config.num_layers)])
    return jnp.asarray(local_N)[layer]


def _tables_of(tables: Any, windowed: jax.Array | None) -> Tables:
    """Rotary tables of a layer, with a window or without one."""
    chosen, local = tables
    if local is None:
        return chosen
    return local if windowed is None else jax.tree.map(lambda a, b: jnp.where(windowed, a, b), local, chosen)


def rotated(x: jax.Array, tables: Tables, trunk: int = 0, kept_as: str = AGAIN) -> jax.Array:
    """Queries or keys after their rotation; `kept_as`: its name for remat. On TPUs, the first `trunk` places and the
    branches behind them each by themselves: what attention's kernel reads needs no copy then.
    """
    if not trunk:
        return checkpoint_name(apply_rotary(x, tables), kept_as)
    parts = zip(split(x, trunk), *(split(table, trunk) for table in tables), strict=True)
    return join(*(checkpoint_name(apply_rotary(part, (cos, sin), True), kept_as) for part, cos, sin in parts))
