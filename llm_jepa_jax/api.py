# SPDX-License-Identifier: Apache-2.0
"""The notebook façade: a trained model as one object."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.checkpoint.export_settings import SHARD_BYTES, ExportSettings
from llm_jepa_jax.checkpoint.hf_directory import is_published
from llm_jepa_jax.checkpoint.places import new_place, on_this_machine, place
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.encode import encode, hidden_states, pad_right, view_ids
from llm_jepa_jax.eval.generate import Generator, Vocabulary, make_generator
from llm_jepa_jax.eval.sampling import Sampling
from llm_jepa_jax.eval_config import EvalConfig
from llm_jepa_jax.models.transformer import head_kernel
from llm_jepa_jax.parallel.sharding import num_row_shards, rows_sharding
from llm_jepa_jax.run_directory import Run, export_adapter, export_run, open_published, open_run
from llm_jepa_jax.text.chat import VIEW_ROLES, Message, render_prompt
from llm_jepa_jax.text.checkpoint_files import configured_ids
from llm_jepa_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A run's newest checkpoint, or a published model, ready to use."""

    run: Run

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer: `encode(text)`, `decode(ids)`.

        Raises:
            UserError: a published model's is not read.
        """
        if self.run.tokenizer is None:
            raise UserError("the model came without a tokenizer; pass token ids to hidden or logits")
        return self.run.tokenizer

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.run.config.train.dtype)

    def hidden(self, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Hidden states after the final norm of each sequence of token ids: float32 [length, D] each.

        Raises:
            UserError: a sequence is empty, too long, or holds an id outside the vocabulary.
        """
        self._check(ids)
        if not ids:
            return []
        rows = -(-len(ids) // num_row_shards(self.run.mesh)) * num_row_shards(self.run.mesh)
        arrays = pad_right(ids, rows)
        with jax.set_mesh(self.run.mesh):
            placed = [jax.device_put(array, rows_sharding(self.run.mesh)) for array in arrays]
            (hidden_RxLxD,) = hidden_states(self.run.params, *placed, config=self.run.config.model, dtype=self._dtype)
        host = np.asarray(hidden_RxLxD.astype(jnp.float32))
        return [host[row, : len(sequence)] for row, sequence in enumerate(ids)]

    def logits(self, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Next-token logits of each sequence: float32 [length, V] each, of ids alone; errors as in `hidden`."""
        model = self.run.config.model
        head_DxV = np.asarray(head_kernel(self.run.params, model).astype(jnp.float32))[:, : model.vocab_size]
        cap = model.logit_soft_cap
        bias_V = np.asarray(self.run.params.get("head_bias", np.zeros(1)), np.float32)[: model.vocab_size]
        logits = [hidden_LxD @ head_DxV + bias_V for hidden_LxD in self.hidden(ids)]
        return [cap * np.tanh(logits_LxV / cap) for logits_LxV in logits] if cap else logits

    def _check(self, ids: Sequence[Sequence[int]]) -> None:
        model = self.run.config.model
        for number, sequence in enumerate(ids):
            if np.ndim(sequence) != 1:
                raise UserError(f"ids[{number}] is no sequence of token ids; pass a list of sequences, [ids] for one")
            if not 0 < len(sequence) <= model.max_positions:
                raise UserError(f"ids[{number}] has {len(sequence)} tokens; use 1 to {model.max_positions}")
            if min(sequence) < 0 or max(sequence) >= model.vocab_size:
                raise UserError(f"ids[{number}] holds an id outside 0 to {model.vocab_size - 1}")

    def encode(self, texts: Sequence[str], num_predictors: int | None = None, role: str = "user") -> np.ndarray:
        """Embeddings of views, float32 [n, D].

        `role="user"` gives the text view's, `role="assistant"` the code view's, as trained: the view that predicts has
        the run's predictor tokens (Pred(Enc(Text)), unless `jepa.direction=code_to_text`), the other has none.
        `num_predictors` sets another number. A published model whose weights have no rows for predictor tokens encodes
        both views without; loading it says so.

        Raises:
            UserError: no such role, or more predictor tokens than the weights have rows for.
        """
        run = self.run
        views = {role: view for view, role in VIEW_ROLES.items()}
        if role not in views:
            raise UserError(f"role={role!r}; use 'user' (text view) or 'assistant' (code view)")
        most = sum(index < run.config.model.vocab_size for index in self.tokenizer.predictor_ids)
        if num_predictors is not None and not 0 <= num_predictors <= most:
            raise UserError(f"num_predictors={num_predictors}; use 0 to {most}")
        ids = view_ids(self.tokenizer, run.config.objective.jepa, views[role], texts, num_predictors)
        return encode(run.params, run.config.model, run.config.objective.jepa, ids, run.mesh, self._dtype)

    def generate(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int | None = None,
        system: str | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[Any]:
        """Answers, without the tokens that end them; greedy where the run's `eval.temperature` is 0.

        Texts are user prompts, or texts to go on with where there is no chat template; their answers are texts.
        Sequences of token ids are continued as they are; their answers are lists of ids. `system` defaults to the
        system turn of the run's evaluation data, the others to what the run's configuration says. With a `temperature`
        of its own a call takes `top_k` and `top_p` from its arguments alone. A prompt given n times has n draws.

        Raises:
            UserError: a prompt is empty, too long, holds an id outside the vocabulary, or is text without a tokenizer;
                or a setting is out of its range or has no effect.
        """
        run = self.run
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts and len(texts) < len(prompts) or (system is not None and not texts):
            raise UserError("prompts: pass texts, or sequences of token ids, which have no system turn")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}; use 1 or more")
        seed, sampling = run.config.seed if seed is None else seed, self._sampling(temperature, top_k, top_p)
        generator = self._generator(bool(texts), max_new_tokens or run.config.eval.max_new_tokens, sampling)
        if not texts:
            return [new for new, _ in generator(run.params, prompts, seed=seed)]
        system = run.system if system is None else system
        turns = [Message("system", system)] if system else []
        ids = [render_prompt(self.tokenizer, [*turns, Message("user", prompt)]) for prompt in texts]
        return [self.tokenizer.decode(new) for new, _ in generator(run.params, ids, seed=seed)]

    def _sampling(self, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling:
        keys = self.run.config.eval
        if temperature is not None:  # the run's filters go with the run's temperature
            keys = EvalConfig(temperature=temperature)
        return Sampling(
            keys.temperature,
            keys.top_k if top_k is None else top_k,
            keys.top_p if top_p is None else top_p,
        )

    def _generator(self, texts: bool, max_new_tokens: int, sampling: Sampling) -> Generator:
        """One for each set of settings, so that a second call compiles nothing."""
        wanted = (texts, max_new_tokens, sampling)
        if wanted not in self._generators:
            tokenizer = self.tokenizer if texts else self.run.tokenizer or self._vocabulary
            made = make_generator(self.run.config, tokenizer, self.run.mesh, max_new_tokens, sampling)
            self._generators[wanted] = made
        return self._generators[wanted]

    @functools.cached_property
    def _generators(self) -> dict[tuple[bool, int, Sampling], Generator]:
        return {}

    @property
    def _vocabulary(self) -> Vocabulary:
        """That of a published model without a tokenizer."""
        ends = configured_ids(on_this_machine(self.run.published), "eos_token_id") if self.run.published else []
        return Vocabulary(self.run.config.model.vocab_size, tuple(ends))

    def save_hf(
        self,
        directory: str | pathlib.Path,
        *,
        dtype: str = "",
        shard_bytes: int = SHARD_BYTES,
        predictor_rows: str = "keep",
    ) -> None:
        """Writes a directory that `transformers` and vLLM read: weights, `config.json`, tokenizer, generation
        settings and a model card. Adapters are merged.

        `dtype` is that of the weights (default: as they are), a file of several tensors holds up to `shard_bytes`, and
        `predictor_rows="drop"` leaves out the rows of predictor tokens that the checkpoint did not have.

        Raises:
            UserError: no published family can say this model, the directory is not new, or an argument is wrong.
        """
        export_run(self.run, new_place(directory), ExportSettings(dtype, shard_bytes), predictor_rows)

    def save_adapter(self, directory: str | pathlib.Path) -> None:
        """Writes the adapters alone, as a directory that `peft` loads beside the base.

        Raises:
            UserError: there are none, their base is no published model, or the directory is not new.
        """
        export_adapter(self.run, new_place(directory))


def load(directory: str | pathlib.Path, adapter: str | pathlib.Path | None = None) -> LanguageModel:
    """Opens a run's directory, or that of a published model (`config.json` and safetensors), or a model of the hub.

    Directories may lie in a store (`gs://BUCKET/DIR`, also `s3://`, `az://`, `hf://`). `adapter` is the directory of
    a PEFT adapter to a published model.

    Raises:
        UserError: it is neither, a file is missing or damaged, or the model or the adapter is not supported.
    """
    found = place(str(directory))
    if is_published(found):
        return LanguageModel(open_published(found, on_this_machine(place(str(adapter))) if adapter else None))
    if adapter:
        raise UserError(f"{found}: is no published model; adapter={adapter} lies beside one")
    return LanguageModel(open_run(found))
