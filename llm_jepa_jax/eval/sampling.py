# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen: the most probable one, or one drawn from the filtered distribution."""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval_config import sampling_fault


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature (0: greedy) and the two filters; see `eval_config.EvalConfig`.

    Raises:
        UserError: a value is out of its range, or a filter has no effect.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        fault = sampling_fault(self.temperature, self.top_k, self.top_p)
        if fault:
            name, value, why = fault
            raise UserError(f"{name}={value} {why}")

    def choose(self, logits_BxV: jax.Array, keys_Bx2: jax.Array, step: jax.Array | int) -> jax.Array:
        """The next token of each prompt, int32 [B]; -inf forbids one. `keys_Bx2`: from `prompt_keys`.

        A draw adds Gumbel noise of (key of the prompt, step) to the filtered logits and takes the largest, so it does
        not depend on what else is in the batch.
        """
        if not self.temperature:
            return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        keys_B = jax.random.wrap_key_data(keys_Bx2, impl="threefry2x32")
        kept_BxV = self.filtered(logits_BxV)

        def draw(key: jax.Array, kept_V: jax.Array) -> jax.Array:
            return jax.random.categorical(jax.random.fold_in(key, step), kept_V)

        return jax.vmap(draw)(keys_B, kept_BxV).astype(jnp.int32)

    def filtered(self, logits_BxV: jax.Array) -> jax.Array:
        """Logits of the distribution that is drawn from, float32 [B, V]; -inf where a token is left out.

        As in `transformers`: first the temperature; then the `top_k` largest; then, of what they leave, the fewest of
        the most probable tokens whose probabilities reach `top_p` (nucleus, Holtzman et al., 2020), at least one.
        Tokens of equal logits stay or go together, where `transformers` leaves that to its sorting.
        """
        logits_BxV = logits_BxV / self.temperature
        if self.top_k:
            kth_Bx1 = jax.lax.top_k(logits_BxV, min(self.top_k, logits_BxV.shape[-1]))[0][:, -1:]
            logits_BxV = jnp.where(logits_BxV < kth_Bx1, -jnp.inf, logits_BxV)
        if self.top_p < 1.0:
            rising_BxV = jnp.sort(logits_BxV, axis=-1)
            up_to_BxV = jnp.cumsum(jax.nn.softmax(rising_BxV, axis=-1), axis=-1)
            least_B = jnp.min(jnp.where(up_to_BxV > 1.0 - self.top_p, rising_BxV, jnp.inf), axis=-1)
            least_Bx1 = jnp.minimum(least_B, rising_BxV[:, -1])[:, None]
            logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
        return logits_BxV


def prompt_keys(seed: int, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Raw random keys uint32 [n, 2], each of (seed, the prompt's tokens, how often it came before).

    So a prompt's draws are its own whatever stands around it, and one that comes twice has two answers.
    """
    before: collections.Counter[bytes] = collections.Counter()
    keys_nx2 = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(prompts):
        tokens = np.asarray(prompt, "<i4").tobytes()
        digest = hashlib.blake2b(tokens, digest_size=8, key=f"{seed}/{before[tokens]}".encode()).digest()
        keys_nx2[row] = np.frombuffer(digest, "<u4")
        before[tokens] += 1
    return keys_nx2
