# SPDX-License-Identifier: Apache-2.0
"""How many ids a model has, and how many rows are stored for them."""

import dataclasses
import math

from llm_jepa_jax.config import Config, ModelConfig
from llm_jepa_jax.errors import UserError


def with_vocabulary(config: Config, tokenizer_size: int, tensor: int, initial_size: int = 0) -> Config:
    """Fills `model.vocab_size` (0: the tokenizer's size), checks that it holds every id, and pads it to the mesh.

    `tensor` is the size of the axis that the vocabulary is cut over, `initial_size` the vocabulary of the model to
    start from, whose rows are all kept.

    Raises:
        UserError: the model's vocabulary is smaller than the tokenizer's or that of the model to start from.
    """
    size = config.model.vocab_size or max(tokenizer_size, initial_size)
    for smallest, what in ((initial_size, "of `init.checkpoint`"), (tokenizer_size, "pieces of the tokenizer")):
        if size < smallest:
            raise UserError(
                f"config: `model.vocab_size`={size} is below the {smallest} {what}; use {smallest} or more, or 0"
            )
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=padded(model, tensor))


def padded(model: ModelConfig, tensor: int) -> ModelConfig:
    """The same model with rows that divide over `tensor` devices: the multiple it has is kept where it does."""
    if model.padded_vocab_size % tensor == 0:
        return model
    return dataclasses.replace(model, vocab_multiple=math.lcm(model.vocab_multiple, tensor))


def padding_line(model: ModelConfig) -> str:
    """What padding the vocabulary has, in words; empty: none."""
    added = model.padded_vocab_size - model.vocab_size
    if not added:
        return ""
    return (
        f"vocabulary: {model.vocab_size:,} ids in {model.padded_vocab_size:,} rows, a multiple of "
        f"{model.vocab_multiple} (model.vocab_multiple); the {added:,} behind them are zeros, never predicted and "
        "never exported"
    )
