# SPDX-License-Identifier: Apache-2.0
"""Greedy batched generation with a KV cache, prefill and decoding in one jitted function."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jepa_jax.config import ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.transformer import decode_step, head_kernel, logits, prefill
from llm_jepa_jax.parallel.sharding import num_row_shards, rows_sharding
from llm_jepa_jax.text.tokenizer import Tokenizer

WIDTH_MULTIPLE = 32
"""Prompts are padded to a multiple of this, so that few shapes are compiled."""


NO_END = -1
"""Stands behind an answer of a model without an end token."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What generation needs to know of a tokenizer, for a model that comes without one."""

    vocab_size: int
    stop_ids: tuple[int, ...]
    pad_id: int = 0
    forbidden_ids: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates with one model configuration; parameters are an argument, so training reuses what is compiled."""

    model: ModelConfig
    tokenizer: Tokenizer | Vocabulary
    mesh: Mesh
    max_new_tokens: int
    batch_size: int
    dtype: Any

    def __call__(
        self, params: Any, prompts: Sequence[Sequence[int]], progress: Callable[[int], None] = lambda done: None
    ) -> list[tuple[list[int], bool]]:
        """Continues each prompt: its new token ids (without the end token), and whether it ended by itself.

        Prompts are sorted by length and padded on the left; the answers come back in the order given. `progress` is
        called with the number of prompts done.

        Raises:
            UserError: a prompt is empty or holds an id outside the vocabulary, or it and its answer do not fit
                `model.max_positions`.
        """
        for number, prompt in enumerate(prompts):
            if not len(prompt) or min(prompt) < 0 or max(prompt) >= self.model.vocab_size:
                raise UserError(
                    f"prompts[{number}] is empty or holds an id outside 0 to {self.model.vocab_size - 1}; "
                    "the tokenizer and the weights may be of different models"
                )
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + self.max_new_tokens > self.model.max_positions:
            raise UserError(
                f"a prompt of {longest} tokens and eval.max_new_tokens={self.max_new_tokens} exceed "
                f"model.max_positions={self.model.max_positions}; shorten one of them"
            )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        shards = num_row_shards(self.mesh)
        size = -(-min(self.batch_size, max(1, len(prompts))) // shards) * shards
        answers: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            new_BxT = self._batch(params, [prompts[i] for i in chosen], size)
            for row, i in enumerate(chosen):
                answers[i] = self._cut(new_BxT[row])
            progress(min(start + size, len(order)))
        return answers

    def _cut(self, new_T: np.ndarray) -> tuple[list[int], bool]:
        ends = np.flatnonzero(np.isin(new_T, self._stop_ids))
        return (new_T[: ends[0]] if len(ends) else new_T).tolist(), bool(len(ends))

    def _batch(self, params: Any, prompts: list[Sequence[int]], size: int) -> np.ndarray:
        width = -(-max(len(prompt) for prompt in prompts) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        tokens_BxS = np.full((size, width), self.tokenizer.pad_id, np.int32)
        first_slot_B = np.full(size, width - 1, np.int32)
        for row, prompt in enumerate(prompts):
            first_slot_B[row] = width - len(prompt)
            tokens_BxS[row, first_slot_B[row] :] = prompt
        ended_B = np.arange(size) >= len(prompts)
        rows = rows_sharding(self.mesh)
        arrays = [
            jax.make_array_from_callback(a.shape, rows, a.__getitem__) for a in (tokens_BxS, first_slot_B, ended_B)
        ]
        with jax.set_mesh(self.mesh):
            return np.asarray(jax.device_get(self._compiled(params, *arrays)))

    @property
    def _stop_ids(self) -> tuple[int, ...]:
        return self.tokenizer.stop_ids or (NO_END,)

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self._generate, out_shardings=jax.NamedSharding(self.mesh, jax.P()))

    @functools.cached_property
    def _forbidden_V(self) -> np.ndarray:
        """bool [V]: ids that the tokenizer forbids, and rows of the embedding behind its last one."""
        forbidden_V = np.arange(self.model.padded_vocab_size) >= self.tokenizer.vocab_size
        forbidden_V[[i for i in self.tokenizer.forbidden_ids if i < len(forbidden_V)]] = True
        return forbidden_V

    def _generate(self, params: Any, tokens_BxS: jax.Array, first_slot_B: jax.Array, ended_B: jax.Array) -> jax.Array:
        """New tokens [B, T]; after an end token, more end tokens."""
        size, width = tokens_BxS.shape
        stops = jnp.array(self._stop_ids, jnp.int32)
        end = self._stop_ids[0]
        head_DxV = head_kernel(params, self.model).astype(self.dtype)

        def choose(hidden_BxD: jax.Array, ended_B: jax.Array) -> jax.Array:
            logits_BxV = logits(head_DxV, params.get("head_bias"), self.model, hidden_BxD)
            best_B = jnp.argmax(jnp.where(self._forbidden_V, -jnp.inf, logits_BxV), axis=-1).astype(jnp.int32)
            return jnp.where(ended_B, end, best_B)

        def go_on(loop: tuple[Any, ...]) -> jax.Array:
            step, _, ended_B, _, _ = loop
            return (step < self.max_new_tokens) & ~jnp.all(ended_B)

        def body(loop: tuple[Any, ...]) -> tuple[Any, ...]:
            step, token_B, ended_B, cache, new_BxT = loop
            hidden_BxD, cache = decode_step(
                params, self.model, token_B, width + step - 1, first_slot_B, cache, dtype=self.dtype
            )
            token_B = choose(hidden_BxD, ended_B)
            new_BxT = jax.lax.dynamic_update_slice(new_BxT, token_B[:, None], (0, step))
            return step + 1, token_B, ended_B | jnp.isin(token_B, stops), cache, new_BxT

        num_slots = width + self.max_new_tokens
        hidden_BxD, cache = prefill(params, self.model, tokens_BxS, first_slot_B, num_slots, dtype=self.dtype)
        token_B = choose(hidden_BxD, ended_B)
        new_BxT = jnp.full((size, self.max_new_tokens), end, jnp.int32).at[:, 0].set(token_B)
        loop = (jnp.ones((), jnp.int32), token_B, ended_B | jnp.isin(token_B, stops), cache, new_BxT)
        return jax.lax.while_loop(go_on, body, loop)[-1]
