# SPDX-License-Identifier: Apache-2.0
"""Chat rendering: token ids and role spans in one go, so nothing is ever found by searching text."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jepa_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
BOS_ROLE = 0
ROLE_CODES = {role: code for code, role in enumerate(ROLES, start=1)}
"""Codes of `Rendered.roles`; 0 is the beginning of the sequence."""
VIEW_HEADER = 2
"""Tokens of a view before its content: the beginning of the sequence and the role."""
VIEW_ROLES = {"text": "user", "code": "assistant"}


@dataclasses.dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation of n tokens: `<bos>` then `<role> content <end-of-turn>` for every turn."""

    tokens: np.ndarray
    """int32 [n]"""
    roles: np.ndarray
    """uint8 [n]: the turn each token belongs to, its role and end tokens included (`ROLE_CODES`)."""
    assistant_target: np.ndarray
    """bool [n]: the token is content of an assistant turn, or that turn's end token."""
    turn_ends: np.ndarray
    """int32 [turns]: place of each turn's end token."""


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """The whole conversation."""
    contents = tokenizer.encode_batch([message.content for message in messages])
    tokens, roles, targets, ends = [tokenizer.bos_id], [BOS_ROLE], [False], []
    for message, content in zip(messages, contents, strict=True):
        length = len(content) + 2
        tokens += [tokenizer.role_ids[message.role], *content, tokenizer.end_of_turn_id]
        ends.append(len(tokens) - 1)
        roles += [ROLE_CODES[message.role]] * length
        targets += [False] + [message.role == "assistant"] * (length - 1)
    return Rendered(
        np.array(tokens, np.int32), np.array(roles, np.uint8), np.array(targets, np.bool_), np.array(ends, np.int32)
    )


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The turns before an answer, and the token that opens the answer."""
    return [*render(tokenizer, messages).tokens.tolist(), tokenizer.role_ids["assistant"]]


def render_view(tokenizer: Tokenizer, role: str, content: str, view_end: str) -> list[int]:
    """One view as a sequence of its own: `<bos><role> content`, with the end-of-turn token if `view_end` is `turn`."""
    end = [tokenizer.end_of_turn_id] if view_end == "turn" else []
    return [tokenizer.bos_id, tokenizer.role_ids[role], *tokenizer.encode(content), *end]


def with_predictors(view: Sequence[int] | np.ndarray, predictor_ids: Sequence[int], placement: str) -> np.ndarray:
    """A view's tokens and its predictor tokens, in order: behind it (`append`) or before its content (`prepend`)."""
    header = len(view) if placement == "append" else VIEW_HEADER
    return np.concatenate([view[:header], predictor_ids, view[header:]]).astype(np.int32)
