# SPDX-License-Identifier: Apache-2.0
"""Batched generation with a KV cache, prefill and decoding in one jitted function; greedy or sampled."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jepa_jax.config import Config, ModelConfig
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.batching import cache_bytes, fitting_rows, forward_bytes, free_bytes, in_batches, weight_bytes
from llm_jepa_jax.eval.sampling import Sampling, prompt_keys
from llm_jepa_jax.models.transformer import decode_step, head_kernel, logits, prefill
from llm_jepa_jax.parallel.sharding import num_row_shards, rows_sharding
from llm_jepa_jax.text.tokenizer import Tokenizer

LOG = logging.getLogger("llm_jepa_jax")
WIDTH_MULTIPLE = 32
"""Prompts are padded to a multiple of this, and what they share is cut to one, so that few shapes are compiled."""
SHARED_PAYS = 1024
"""A shared prefix is encoded apart where that saves so many tokens: it is one more program to compile."""


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
    """Prompts together; 0: as many as fit, see `batching.py`."""
    dtype: Any
    sampling: Sampling = Sampling()

    def __call__(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        progress: Callable[[int], None] = lambda done: None,
        seed: int = 0,
    ) -> list[tuple[list[int], bool]]:
        """Continues each prompt: its new token ids (without the end token), and whether it ended by itself.

        The longest prompts come first, padded on the left; what all begin with is encoded once; answers come back in
        the order given. They do not depend on the batch, but for ties that rounding decides. `progress` is called with
        the number of prompts done; `seed` is that of draws.

        Raises:
            UserError: a prompt is empty or holds an id outside the vocabulary, it and its answer do not fit
                `model.max_positions`, or one prompt a device does not fit memory.
        """
        self._check(prompts)
        shards = num_row_shards(self.mesh)
        answers: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
        keys_nx2 = prompt_keys(seed, prompts)
        shared = self._shared(prompts)
        prefix = self._prefix(params, prompts[0][:shared]) if shared else None
        beside = 0.0 if self.batch_size else weight_bytes(params, self.mesh, self.dtype)
        free = 0.0 if self.batch_size else free_bytes(self.mesh) - beside

        def rows_for(longest: int, left: int) -> int:
            if self.batch_size:
                return -(-min(self.batch_size, len(prompts)) // shards) * shards
            return fitting_rows(self._row_bytes(_padded(len(prompts[longest]) - shared), shared), free, left, self.mesh)

        def run(chosen: Sequence[int], rows: int) -> None:
            own = [prompts[i][shared:] for i in chosen]
            new_BxT = self._batch(params, prefix, shared, own, keys_nx2[list(chosen)], rows)
            for row, i in enumerate(chosen):
                answers[i] = self._cut(new_BxT[row])

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        in_batches(order, rows_for, run, shards, progress)
        return answers

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
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

    def _shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many first tokens of all prompts are encoded once: whole multiples, and every prompt keeps one."""
        if not prompts:
            return 0
        alike = shared_length(prompts) // WIDTH_MULTIPLE * WIDTH_MULTIPLE
        return alike if (len(prompts) - num_row_shards(self.mesh)) * alike >= SHARED_PAYS else 0

    def _row_bytes(self, own: int, shared: int) -> float:
        """What a prompt takes of a device: its cache, twice while it is laid out, and what prefill and head hold."""
        tensor, slots = self.mesh.shape["tensor"], own + shared + self.max_new_tokens
        cache = cache_bytes(self.model, tensor, slots, self.dtype)
        return 2 * cache + forward_bytes(self.model, tensor, own + shared, 1, self.dtype)

    def _cut(self, new_T: np.ndarray) -> tuple[list[int], bool]:
        ends = np.flatnonzero(np.isin(new_T, self._stop_ids))
        return (new_T[: ends[0]] if len(ends) else new_T).tolist(), bool(len(ends))

    def _prefix(self, params: Any, tokens: Sequence[int]) -> Any:
        """The cache of what all prompts begin with, once for each row shard: none waits for another's."""
        tokens_BxP = np.tile(np.asarray(tokens, np.int32), (num_row_shards(self.mesh), 1))
        LOG.info("%d tokens that all prompts begin with are encoded once", len(tokens))
        with jax.set_mesh(self.mesh):
            return self._compiled_prefix(params, *self._placed(tokens_BxP))

    def _placed(self, *arrays: np.ndarray) -> list[jax.Array]:
        rows = rows_sharding(self.mesh)
        return [jax.make_array_from_callback(array.shape, rows, array.__getitem__) for array in arrays]

    def _batch(
        self, params: Any, prefix: Any, shared: int, own: list[Sequence[int]], keys_nx2: np.ndarray, rows: int
    ) -> np.ndarray:
        width = _padded(max(len(tokens) for tokens in own))
        tokens_BxS = np.full((rows, width), self.tokenizer.pad_id, np.int32)
        first_slot_B = np.full(rows, width - 1, np.int32)
        for row, tokens in enumerate(own):
            first_slot_B[row] = width - len(tokens)
            tokens_BxS[row, first_slot_B[row] :] = tokens
        keys_Bx2 = np.zeros((rows, 2), np.uint32)
        keys_Bx2[: len(own)] = keys_nx2
        arrays = self._placed(tokens_BxS, first_slot_B, np.arange(rows) >= len(own), keys_Bx2)
        with jax.set_mesh(self.mesh):
            return np.asarray(jax.device_get(self._compiled(params, prefix, *arrays)))

    @property
    def _stop_ids(self) -> tuple[int, ...]:
        return self.tokenizer.stop_ids or (NO_END,)

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self._generate, out_shardings=jax.NamedSharding(self.mesh, jax.P()))

    @functools.cached_property
    def _compiled_prefix(self) -> Any:
        return jax.jit(self._encode)

    @functools.cached_property
    def _forbidden_V(self) -> np.ndarray:
        """bool [V]: ids that the tokenizer forbids, and rows of the embedding behind its last one."""
        forbidden_V = np.arange(self.model.padded_vocab_size) >= self.tokenizer.vocab_size
        forbidden_V[[i for i in self.tokenizer.forbidden_ids if i < len(forbidden_V)]] = True
        return forbidden_V

    def _encode(self, params: Any, tokens_BxP: jax.Array) -> Any:
        first_slot_B = jnp.zeros(len(tokens_BxP), jnp.int32)
        return prefill(params, self.model, tokens_BxP, first_slot_B, tokens_BxP.shape[1], dtype=self.dtype)[1]

    def _generate(
        self,
        params: Any,
        prefix: Any,
        tokens_BxS: jax.Array,
        first_slot_B: jax.Array,
        ended_B: jax.Array,
        keys_Bx2: jax.Array,
    ) -> jax.Array:
        """New tokens [B, T]; after an end token, more end tokens. `prefix` and slots are those of `prefill`."""
        shared = jax.tree.leaves(prefix)[0].shape[2] if prefix else 0
        width = shared + tokens_BxS.shape[1]
        stops = jnp.array(self._stop_ids, jnp.int32)
        end = self._stop_ids[0]
        head_DxV = head_kernel(params, self.model).astype(self.dtype)

        def choose(hidden_BxD: jax.Array, ended_B: jax.Array, step: jax.Array | int) -> jax.Array:
            logits_BxV = logits(head_DxV, params.get("head_bias"), self.model, hidden_BxD)
            allowed_BxV = jnp.where(self._forbidden_V, -jnp.inf, logits_BxV)
            return jnp.where(ended_B, end, self.sampling.choose(allowed_BxV, keys_Bx2, step))

        def go_on(loop: tuple[Any, ...]) -> jax.Array:
            step, _, ended_B, _, _ = loop
            return (step < self.max_new_tokens) & ~jnp.all(ended_B)

        def body(loop: tuple[Any, ...]) -> tuple[Any, ...]:
            step, token_B, ended_B, cache, new_BxT = loop
            hidden_BxD, cache = decode_step(
                params, self.model, token_B, width + step - 1, first_slot_B, cache, dtype=self.dtype
            )
            token_B = choose(hidden_BxD, ended_B, step)
            new_BxT = jax.lax.dynamic_update_slice(new_BxT, token_B[:, None], (0, step))
            return step + 1, token_B, ended_B | jnp.isin(token_B, stops), cache, new_BxT

        num_slots = width + self.max_new_tokens
        hidden_BxD, cache = prefill(params, self.model, tokens_BxS, first_slot_B, num_slots, prefix, dtype=self.dtype)
        token_B = choose(hidden_BxD, ended_B, 0)
        new_BxT = jnp.full((len(tokens_BxS), self.max_new_tokens), end, jnp.int32).at[:, 0].set(token_B)
        loop = (jnp.ones((), jnp.int32), token_B, ended_B | jnp.isin(token_B, stops), cache, new_BxT)
        return jax.lax.while_loop(go_on, body, loop)[-1]


def make_generator(
    config: Config,
    tokenizer: Tokenizer | Vocabulary,
    mesh: Mesh,
    max_new_tokens: int = 0,
    sampling: Sampling | None = None,
) -> Generator:
    """What the configuration says; `max_new_tokens` (0: its own) and `sampling` in place of its own."""
    keys = config.eval
    return Generator(
        config.model, tokenizer, mesh, max_new_tokens or keys.max_new_tokens, keys.batch_size,
        jnp.dtype(config.train.dtype), sampling or Sampling(keys.temperature, keys.top_k, keys.top_p),
    )  # fmt: skip


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left out."""
    least, most = min(map(tuple, prompts)), max(map(tuple, prompts))
    both = min(map(len, prompts)) - 1
    return next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if i >= both or a != b), both)


def _padded(length: int) -> int:
    return -(-length // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
