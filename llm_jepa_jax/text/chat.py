# SPDX-License-Identifier: Apache-2.0
"""Chat rendering: token ids and role spans in one go, so nothing is ever found by searching text."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jepa_jax.objective_config import JepaConfig
from llm_jepa_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
BOS_ROLE = 0
ROLE_CODES = {role: code for code, role in enumerate(ROLES, start=1)}
"""Codes of `Rendered.roles`; 0 is the beginning of the sequence."""
VIEW_HEADER, DOCUMENT_HEADER = 2, 1
"""Tokens of a view before its content: the beginning of the sequence and the role; of plain text's views, no role."""
VIEW_ROLES = {"text": "user", "code": "assistant"}


@dataclasses.dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation of n tokens: `<bos>` then `<role> content <end-of-turn>` for every turn; or plain text."""

    tokens: np.ndarray
    """int32 [n]"""
    roles: np.ndarray
    """uint8 [n]: the turn each token belongs to, its role and end tokens included (`ROLE_CODES`)."""
    assistant_target: np.ndarray
    """bool [n]: the token is content of an assistant turn, or that turn's end token; of plain text, all but bos."""
    contents: np.ndarray
    """int32 [turns, 2]: place of each turn's role token, and of its content's last token. Plain text is a turn without
    a role token, and an empty one behind it."""


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """The whole conversation."""
    contents = tokenizer.encode_batch([message.content for message in messages])
    tokens, roles, targets, contents_at = [tokenizer.bos_id], [BOS_ROLE], [False], []
    for message, content in zip(messages, contents, strict=True):
        length = len(content) + 2
        tokens += [tokenizer.role_ids[message.role], *content, tokenizer.end_of_turn_id]
        contents_at.append((len(tokens) - length, len(tokens) - 2))
        roles += [ROLE_CODES[message.role]] * length
        targets += [False] + [message.role == "assistant"] * (length - 1)
    return Rendered(
        np.array(tokens, np.int32),
        np.array(roles, np.uint8),
        np.array(targets, np.bool_),
        np.array(contents_at, np.int32),
    )


def render_document(tokenizer: Tokenizer, content: Sequence[int]) -> Rendered:
    """Plain text of n tokens: `<bos> content <end-of-turn>`."""
    size = len(content)
    return Rendered(
        np.array([tokenizer.bos_id, *content, tokenizer.end_of_turn_id], np.int32),
        np.full(size + 2, BOS_ROLE, np.uint8),
        np.arange(size + 2) > 0,
        np.array([(0, size), (size, size)], np.int32),
    )


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The turns before an answer, and the token that opens the answer."""
    return [*render(tokenizer, messages).tokens.tolist(), tokenizer.role_ids["assistant"]]


def render_view(tokenizer: Tokenizer, role: str, content: str) -> list[int]:
    """One view as a sequence of its own, without what comes at its end: `<bos><role> content`."""
    return [tokenizer.bos_id, tokenizer.role_ids[role], *tokenizer.encode(content)]


@dataclasses.dataclass(frozen=True)
class ViewTokens:
    """The tokens that views have beside their content."""

    predictors: tuple[int, ...]
    """Of the view that predicts, in order."""
    end: tuple[int, ...]
    """The end-of-turn token, where views have one."""
    placement: str

    def predicting(self, view: Sequence[int] | np.ndarray, header: int = VIEW_HEADER) -> np.ndarray:
        """The whole view that predicts: predictor tokens behind its content (`append`) or before it (`prepend`).

        `header` is the number of tokens before its content.
        """
        header = len(view) if self.placement == "append" else header
        return np.concatenate([view[:header], self.predictors, view[header:], self.end]).astype(np.int32)

    def predicted(self, view: Sequence[int] | np.ndarray) -> np.ndarray:
        """The whole view that is predicted."""
        return np.concatenate([view, self.end]).astype(np.int32)

    @property
    def branch(self) -> np.ndarray:
        """What comes behind the content of the view that predicts, where there are predictor tokens; else nothing."""
        return np.array(self.predictors + self.end if self.predictors else (), np.int32)


def view_tokens(tokenizer: Tokenizer, jepa: JepaConfig, num_predictors: int | None = None) -> ViewTokens:
    """The tokens that views have under a configuration; `num_predictors` is another k than its own."""
    k = jepa.num_predictors if num_predictors is None else num_predictors
    ids = tokenizer.predictor_ids[:1] * k if jepa.shared_predictor else tokenizer.predictor_ids[:k]
    end = (tokenizer.end_of_turn_id,) if jepa.view_end == "turn" else ()
    return ViewTokens(tuple(ids), end, jepa.placement)
