# SPDX-License-Identifier: Apache-2.0
"""The decoder as pure functions over a plain parameter dictionary. It returns hidden states; objectives own the head.

Parameters of a plain Llama: `embedding [V, D]`, `layers/{attention_norm [N, D], query [N, D, H, h],
key, value [N, D, K, h], out [N, H, h, D], mlp_norm [N, D], gate, up [N, D, F], down [N, F, D]}`, `final_norm [D]`, and
`head [D, V]` unless embeddings are tied. What other models have besides: `X_bias` for a matrix or norm X,
`attention_post_norm`, `mlp_post_norm [N, D]`, `query_norm`, `key_norm` ([N, h], or [N, H, h] and [N, K, h] over all
heads), and one `norm [N, D]` in a parallel block. Layers of different shapes are not stacked: layer 3 has
`layers/3/query [D, H, h]`, and so on. V is `ModelConfig.padded_vocab_size`: ids, and zeros behind them.
Adapters lie beside their weights, and frozen weights may be quantised: `models/lora.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.models.adding import run_adding
from llm_jepa_jax.models.layers import BLOCKS, Cache, Carry, DecoderModule, Decoding, Layout, SeparateLayers
from llm_jepa_jax.models.ops import ATTENTION, HIDDEN, PRODUCT, rotary_tables, soft_cap
from llm_jepa_jax.models.weaving import unweave, weave, with_spare_branch
from llm_jepa_jax.parallel.sharding import constrain, length_parts

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, HIDDEN, ATTENTION),
    "hidden": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}
State = tuple[int, bool]
"""A hidden state: its layer (0: the embeddings, i: what block i gives), and whether the final norm is applied to it."""

UNROLLED_LAYERS = 8
"""Up to this many layers are compiled one after the other, unless remat wants the loop: a loop copies what the backward
pass needs of every layer into one array and back, 1.1 times the step on CPUs."""


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Of the inputs of adapters."""

    share: float
    key: jax.Array


class Decoder(DecoderModule):
    """Embedding, N scanned blocks, final norm."""

    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    longest_segment: int = 0
    keep_kv: bool = False
    states: tuple[State, ...] = ()
    """The hidden states wanted; none: behind the last block, after the final norm."""

    @nn.compact
    def __call__(
        self,
        tokens_RxL: jax.Array,
        positions_RxL: jax.Array,
        layout: Layout | None,
        cache: Any = None,
        decoding: Decoding | None = None,
        layer_sums: Any = None,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        config = self.config
        ids, padding, width = config.vocab_size, config.padded_vocab_size - config.vocab_size, config.embed_dim
        embedding_VxD = self.weight("embedding", (ids, width), ("vocab", "embed"), zeros_behind=(padding, 0))
        if not config.tie_embeddings:
            self.weight("head", (width, ids), ("embed", "vocab"), zeros_behind=(0, padding))
        if config.head_bias:
            self.vector("head_bias", (ids + padding,), "bias", 0.0)
        # From the width that the embedding is stored over to rows and their parts, one axis at a time: XLA does not
        # find the way by itself, and would put all rows on every device. Gradients go back the same way, and in the
        # compute type: the first step is not between float32 arrays.
        looked_up = constrain(
            embedding_VxD[tokens_RxL].astype(self.dtype), "replica_rows", "whole_length", "stored_embed"
        )
        looked_up = constrain(looked_up, "rows", "whole_length", "looked_up")
        embedded_RxLxD = constrain(looked_up, "rows", "length", "embed")
        if config.scale_embeddings:
            embedded_RxLxD = embedded_RxLxD * jnp.asarray(config.embed_dim**0.5, self.dtype)
        inner = self._inner_layers()
        carry = Carry(embedded_RxLxD, cache, jnp.zeros((), jnp.int32), (jnp.zeros_like(embedded_RxLxD),) * len(inner))
        context = (rotary_tables(config, positions_RxL), layout, decoding)
        if layer_sums is None:
            carry, kept = self._layers(inner)(carry, *context)
        else:
            layers, kept = self.variables["params"]["layers"], None
            carry = run_adding(self._blocks(inner), self._unrolled, layers, layer_sums, carry, context)
        raw = {0: embedded_RxLxD, config.num_layers: carry.hidden_RxLxD} | dict(zip(inner, carry.states, strict=True))
        final_norm = self.norm("final_norm", config.embed_dim)
        wanted = self.states or ((config.num_layers, True),)
        out = tuple(final_norm(raw[i]) if normed else raw[i] for i, normed in wanted)
        return out, kept if self.keep_kv else carry.cache

    def _inner_layers(self) -> tuple[int, ...]:
        """The layers between the first and the last whose states are wanted."""
        return tuple(sorted({layer for layer, _ in self.states} - {0, self.config.num_layers}))

    @property
    def _unrolled(self) -> bool:
        return not self.config.uniform or (self.config.num_layers <= UNROLLED_LAYERS and self.remat == "none")

    def _fields(self, inner: tuple[int, ...]) -> tuple[Any, ...]:
        return self.config, self.param_dtype, self.attention, self.longest_segment, self.keep_kv, inner

    @property
    def _remat(self) -> dict[str, Any]:
        # A scan needs no barrier against common subexpressions; layers compiled one after the other do.
        return {"policy": REMAT_POLICIES[self.remat], "prevent_cse": not self.config.uniform}

    def _layers(self, inner: tuple[int, ...]) -> Any:
        """All blocks, one after the other."""
        block = BLOCKS[self.config.block]
        if self.remat != "none":
            block = nn.remat(block, **self._remat)
        if not self.config.uniform:
            return SeparateLayers(*self._fields(inner), block, name="layers")
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.config.num_layers,
            unroll=self.config.num_layers if self._unrolled else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(*self._fields(inner), dropout=self.dropout, name="layers")

    def _blocks(self, inner: tuple[int, ...]) -> Any:
        """What `run_adding` runs: one block for all layers, or one for each where they differ in shape."""
        _, *rest = self._fields(inner)
        if self.config.uniform:
            return self._block(self.config, *rest)
        return tuple(self._block(self.config.layer(number), *rest) for number in range(self.config.num_layers))

    def _block(self, *fields: Any) -> Any:
        """A block as a function of its parameters, the carry, and (rotary tables, layout, nothing)."""
        block = BLOCKS[self.config.block](*fields, parent=None)

        def run(layer: Any, carry: Carry, context: Any) -> Carry:
            return block.apply({"params": layer}, carry, *context)[0]

        return run if self.remat == "none" else jax.checkpoint(run, **self._remat)


def _boxed(config: ModelConfig, param_dtype: Any) -> Any:
    """Shapes with their logical axes, from one abstract init."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    decoder = Decoder(config, param_dtype)
    return jax.eval_shape(lambda key: decoder.init(key, tokens, tokens, Layout(tokens)), jax.random.key(0))["params"]


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.LogicallyPartitioned)


def abstract_params(config: ModelConfig, param_dtype: Any) -> tuple[Any, Any]:
    """Two trees of one structure: `jax.ShapeDtypeStruct`s, and the logical axes of each parameter."""
    boxed = _boxed(config, param_dtype)
    shapes = jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)
    axes = jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=_is_box)
    return shapes, axes


def init_params(key: jax.Array, config: ModelConfig, param_dtype: Any) -> Any:
    """Random parameters as a plain nested dictionary."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    boxed = Decoder(config, param_dtype).init(key, tokens, tokens, Layout(tokens))["params"]
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)


def forward_states(
    params: Any,
    config: ModelConfig,
    tokens_RxL: jax.Array,
    positions_RxL: jax.Array,
    segments_RxL: jax.Array,
    branch_end_RxP: jax.Array | None = None,
    *,
    states: tuple[State, ...] = (),
    dtype: Any,
    remat: str = "none",
    attention: str = "xla",
    longest_segment: int = 0,
    layer_sums: Any = None,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, ...]:
    """The hidden states asked for, each [R, L, D] in the compute type ([R, T, D] with branches; see `batch.Batch`).

    Without any, the one behind the last block after the final norm. A token sees itself and earlier tokens of its own
    segment. States at padding (segment 0) mean nothing. `attention` is a back end that fits the shapes and the
    devices; `xla` fits all, and is what evaluation uses, whose sequences come in every length. `longest_segment`,
    where it is known, is a promise that saves work: no segment has more tokens. With `layer_sums`, gradients by the
    layers are added to them in the backward pass (see `adding.run_adding`). `dropout` is that of adapters.
    """
    decoder = Decoder(
        config, jnp.float32,
        dtype=dtype, remat=remat, attention=attention, longest_segment=longest_segment, states=states,
        dropout=dropout.share if dropout else 0.0,
    )  # fmt: skip
    length, width = segments_RxL.shape[1], tokens_RxL.shape[1]
    row = tokens_RxL, positions_RxL, branch_end_RxP
    if attention == "splash" and width == length and length_parts(length) == 1:
        row = with_spare_branch(tokens_RxL, positions_RxL)
    tokens, positions, branch_end = weave(*row, length)
    layout = Layout(segments_RxL, branch_end)
    keys = {"dropout": dropout.key} if dropout else {}
    found, _ = decoder.apply({"params": params}, tokens, positions, layout, layer_sums=layer_sums, rngs=keys)
    return tuple(unweave(state, length, width) for state in found)


def forward(
    params: Any,
    config: ModelConfig,
    tokens_RxL: jax.Array,
    positions_RxL: jax.Array,
    segments_RxL: jax.Array,
    branch_end_RxP: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """The hidden state behind the last block after the final norm, [R, L, D]; options as in `forward_states`."""
    return forward_states(params, config, tokens_RxL, positions_RxL, segments_RxL, branch_end_RxP, **options)[0]


def head_kernel(params: Any, config: ModelConfig) -> jax.Array:
    """The head [D, V] with its padding, in the parameter type; the transposed embedding where they are tied."""
    return params["embedding"].T if config.tie_embeddings else params["head"]


def logits(head_DxV: jax.Array, bias_V: jax.Array | None, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """float32 [..., V] of states [..., D] behind the final norm, of the head's type. Padding has -inf.

    For training there is `objectives.head`, which never holds the logits of all tokens.
    """
    out = jnp.einsum("...d,dv->...v", hidden, head_DxV, preferred_element_type=jnp.float32)
    if bias_V is not None:
        out += bias_V.astype(jnp.float32)
    out = soft_cap(out, config.logit_soft_cap)
    if config.padded_vocab_size == config.vocab_size:
        return out
    return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, out, -jnp.inf)


def prefill(
    params: Any,
    config: ModelConfig,
    tokens_BxS: jax.Array,
    first_slot_B: jax.Array,
    num_slots: int,
    prefix: Any = None,
    *,
    dtype: Any,
) -> tuple[jax.Array, Any]:
    """Encodes left-padded prompts: hidden state of each last token [B, D], and a cache of `num_slots` slots.

    `prefix` is the cache of P tokens that all prompts begin with, made by this function without padding (of one or more
    prompts; their number divides B); `tokens_BxS` are then what stands behind them, and slots count the prefix.
    `first_slot_B` is where each prompt, with its prefix, begins; what lies before is padding. The cache is a `Cache`,
    or a tuple of one for each layer where layers differ in shape.
    """
    length = jax.tree.leaves(prefix)[0].shape[2] if prefix else 0
    slots_T = jnp.arange(length + tokens_BxS.shape[1])
    positions_BxS = jnp.maximum(slots_T[length:] - first_slot_B[:, None], 0)
    segments_BxT = (slots_T >= first_slot_B[:, None]).astype(jnp.int32)
    decoder = Decoder(config, jnp.float32, dtype=dtype, keep_kv=True)
    (hidden_BxSxD,), kept = decoder.apply({"params": params}, tokens_BxS, positions_BxS, Layout(segments_BxT), prefix)
    room = ((0, 0), (0, 0), (0, num_slots - len(slots_T)), (0, 0), (0, 0))

    def cache(kept: Any, first: int = 0) -> Cache:
        return Cache(*(jnp.pad(array, room) for array in kept), first)

    if config.uniform:
        return hidden_BxSxD[:, -1], cache(kept)
    each = (cache([array[None] for array in arrays], number) for number, arrays in enumerate(kept))
    return hidden_BxSxD[:, -1], tuple(each)


def decode_step(
    params: Any,
    config: ModelConfig,
    token_B: jax.Array,
    slot: jax.Array,
    first_slot_B: jax.Array,
    cache: Any,
    *,
    dtype: Any,
) -> tuple[jax.Array, Any]:
    """Hidden state [B, D] of one new token a prompt, written at `slot` of the cache."""
    slots_S = jnp.arange(jax.tree.leaves(cache)[0].shape[2])
    allowed_BxS = (slots_S <= slot) & (slots_S >= first_slot_B[:, None])
    positions_Bx1 = (slot - first_slot_B)[:, None]
    decoder = Decoder(config, jnp.float32, dtype=dtype)
    (hidden_Bx1xD,), cache = decoder.apply(
        {"params": params}, token_B[:, None], positions_Bx1, None, cache, Decoding(slot, allowed_BxS)
    )
    return hidden_Bx1xD[:, 0], cache


def count_params(params: Any) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
