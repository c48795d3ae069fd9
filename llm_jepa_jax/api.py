# SPDX-License-Identifier: Apache-2.0
"""The notebook façade: a trained model as one object."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jepa_jax.checkpoint.hf_directory import is_published
from llm_jepa_jax.checkpoint.hf_export import SHARD_BYTES, ExportSettings
from llm_jepa_jax.checkpoint.hub import local_directory
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.encode import encode, hidden_states, pad_right, view_ids
from llm_jepa_jax.eval.generate import Generator
from llm_jepa_jax.models.transformer import head_kernel
from llm_jepa_jax.parallel.sharding import num_row_shards, rows_sharding
from llm_jepa_jax.run_directory import Run, export_adapter, export_run, open_published, open_run
from llm_jepa_jax.text.chat import VIEW_ROLES, Message, render_prompt
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
        """Next-token logits of each sequence: float32 [length, V] each; errors as in `hidden`."""
        head_DxV = np.asarray(head_kernel(self.run.params, self.run.config.model).astype(jnp.float32))
        cap = self.run.config.model.logit_soft_cap
        bias_V = np.asarray(self.run.params.get("head_bias", 0.0), np.float32)
        logits = [hidden_LxD @ head_DxV + bias_V for hidden_LxD in self.hidden(ids)]
        return [cap * np.tanh(logits_LxV / cap) for logits_LxV in logits] if cap else logits

    def _check(self, ids: Sequence[Sequence[int]]) -> None:
        model = self.run.config.model
        for number, sequence in enumerate(ids):
            if not 0 < len(sequence) <= model.max_positions:
                raise UserError(f"ids[{number}] has {len(sequence)} tokens; use 1 to {model.max_positions}")
            if min(sequence) < 0 or max(sequence) >= model.vocab_size:
                raise UserError(f"ids[{number}] holds an id outside 0 to {model.vocab_size - 1}")

    def encode(self, texts: Sequence[str], num_predictors: int | None = None, role: str = "user") -> np.ndarray:
        """Embeddings of views, float32 [n, D].

        `role="user"` gives the text view's, `role="assistant"` the code view's, as trained: the view that predicts has
        the run's predictor tokens (Pred(Enc(Text)), unless `jepa.direction=code_to_text`), the other has none.
        `num_predictors` sets another number.
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
        self, prompts: Sequence[str], max_new_tokens: int | None = None, system: str | None = None
    ) -> list[str]:
        """Greedy answers to user prompts. `system` defaults to the system turn of the run's evaluation data."""
        config = self.run.config
        generator = Generator(
            config.model, self.tokenizer, self.run.mesh, max_new_tokens or config.eval.max_new_tokens,
            config.eval.batch_size, self._dtype,
        )  # fmt: skip
        system = self.run.system if system is None else system
        turns = [Message("system", system)] if system else []
        ids = [render_prompt(self.tokenizer, [*turns, Message("user", prompt)]) for prompt in prompts]
        return [self.tokenizer.decode(new) for new, _ in generator(self.run.params, ids)]

    def save_hf(
        self, directory: str | pathlib.Path, *, dtype: str = "", shard_bytes: int = SHARD_BYTES, num_tokens: int = 0
    ) -> None:
        """Writes a directory that `transformers` and vLLM read: weights, `config.json`, generation settings. Adapters
        are merged.

        `dtype` is that of the weights (default: as they are), a file of several tensors holds up to `shard_bytes`, and
        `num_tokens` keeps that many first rows of the vocabulary (0: all).

        Raises:
            UserError: no published family can say this model, the directory is not new, or an argument is wrong.
        """
        if dtype not in ("", "float32", "bfloat16", "float16"):
            raise UserError(f"dtype={dtype!r}; use float32, bfloat16 or float16")
        settings = ExportSettings(dtype, shard_bytes, num_tokens)
        export_run(self.run, pathlib.Path(directory).expanduser(), settings)

    def save_adapter(self, directory: str | pathlib.Path) -> None:
        """Writes the adapters alone, as a directory that `peft` loads beside the base.

        Raises:
            UserError: there are none, their base is no published model, or the directory is not new.
        """
        export_adapter(self.run, pathlib.Path(directory).expanduser())


def load(directory: str | pathlib.Path, adapter: str | pathlib.Path | None = None) -> LanguageModel:
    """Opens a run's directory, or that of a published model (`config.json` and safetensors), or a model of the hub.

    `adapter` is the directory of a PEFT adapter to a published model.

    Raises:
        UserError: it is neither, a file is missing or damaged, or the model or the adapter is not supported.
    """
    path = local_directory(str(directory))
    if is_published(path):
        return LanguageModel(open_published(path, local_directory(str(adapter)) if adapter else None))
    if adapter:
        raise UserError(f"{path}: is no published model; adapter={adapter} lies beside one")
    return LanguageModel(open_run(path))
