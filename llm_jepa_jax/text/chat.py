# SPDX-License-Identifier: Apache-2.0
"""Chat rendering: token ids and role spans in one go, so nothing is ever found by searching text."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.objective_config import JepaConfig
from llm_jepa_jax.text.interface import ROLES, Message, Tokenizer, View

BOS_ROLE = 0
ROLE_CODES = {role: code for code, role in enumerate(ROLES, start=1)}
"""Codes of `Rendered.roles`; 0 is the beginning of the sequence."""
DOCUMENT_HEADER = 1
"""Tokens before the content of plain text and its views: the beginning of the sequence."""
VIEW_ROLES = {"text": "user", "code": "assistant"}


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation of n tokens, or plain text."""

    tokens: np.ndarray
    """int32 [n]"""
    roles: np.ndarray
    """uint8 [n]: the turn each token belongs to, its header and end tokens included (`ROLE_CODES`)."""
    assistant_target: np.ndarray
    """bool [n]: the token is content of an assistant turn, or that turn's end token; of plain text, all but bos."""
    contents: np.ndarray
    """int32 [turns, 2]: the place before each turn's content, and of its content's last token. Plain text is a turn
    without a header, and an empty one behind it."""
    starts: np.ndarray
    """int32 [turns]: place of each turn's first token; 0 where only the beginning of the sequence is before it."""


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """The whole conversation; errors as in `Tokenizer.turns`, and where nothing stands before a turn's content."""
    tokens, turns = tokenizer.turns(messages)
    roles, targets = np.full(len(tokens), BOS_ROLE, np.uint8), np.zeros(len(tokens), np.bool_)
    for message, turn in sorted(zip(messages, turns, strict=True), key=lambda both: both[1].start):
        roles[turn.start :] = ROLE_CODES[message.role]
        targets[slice(*turn.target)] = True
    for number, turn in enumerate(turns):
        if not turn.content[0]:
            raise UserError(f"the chat template puts no token before the content of turn {number}; it must begin one")
    contents = [(turn.content[0] - 1, turn.content[1] - 1) for turn in turns]
    starts = [0 if tokens[: turn.start] in ([], [tokenizer.bos_id]) else turn.start for turn in turns]
    arrays = (np.array(values, np.int32) for values in (tokens, contents, starts))
    tokens_n, contents_Tx2, starts_T = arrays
    return Rendered(tokens_n, roles, targets, contents_Tx2, starts_T)


def render_document(tokenizer: Tokenizer, content: Sequence[int]) -> Rendered:
    """Plain text of n tokens: `<bos> content <end of text>`."""
    size = len(content)
    return Rendered(
        np.array([tokenizer.bos_id, *content, tokenizer.end_of_text_id], np.int32),
        np.full(size + 2, BOS_ROLE, np.uint8),
        np.arange(size + 2) > 0,
        np.array([(0, size), (size, size)], np.int32),
        np.array([0, size + 1], np.int32),
    )


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The turns before an answer, and what opens the answer."""
    return tokenizer.prompt(messages)


def render_view(tokenizer: Tokenizer, role: str, content: str) -> View:
    """One view as a sequence of its own, without what comes at its end: the beginning, the role's header, content."""
    return tokenizer.view(role, content)


@dataclasses.dataclass(frozen=True)
class ViewTokens:
    """The tokens that views have beside their content."""

    predictors: tuple[int, ...]
    """Of the view that predicts, in order."""
    end: tuple[int, ...]
    """The token that ends the turn of the view that predicts, where views have one."""
    placement: str
    predicted_end: tuple[int, ...] = ()
    """`end` of the view that is predicted."""

    def predicting(self, view: Sequence[int] | np.ndarray, header: int) -> np.ndarray:
        """int32: the whole view that predicts, predictor tokens behind its content (`append`) or before it (`prepend`).

        `header` is the number of tokens before its content.
        """
        header = len(view) if self.placement == "append" else header
        return np.concatenate([view[:header], self.predictors, view[header:], self.end]).astype(np.int32)

    def predicted(self, view: Sequence[int] | np.ndarray) -> np.ndarray:
        """int32: the whole view that is predicted."""
        return np.concatenate([view, self.predicted_end]).astype(np.int32)

    @property
    def branch(self) -> np.ndarray:
        """What comes behind the content of the view that predicts, where there are predictor tokens; else nothing."""
        return np.array(self.predictors + self.end if self.predictors else (), np.int32)


def view_tokens(tokenizer: Tokenizer, jepa: JepaConfig, num_predictors: int | None = None) -> ViewTokens:
    """The tokens that views have under a configuration; `num_predictors` is another k than its own.

    Raises:
        UserError: `view_end=turn` where the chat template ends a turn with no token of its own.
    """
    k = jepa.num_predictors if num_predictors is None else num_predictors
    ids = tokenizer.predictor_ids[:1] * k if jepa.shared_predictor else tokenizer.predictor_ids[:k]
    roles = ("user", "assistant") if jepa.source == "text" else ("assistant", "user")
    end, predicted_end = ((tokenizer.turn_end(role),) if jepa.view_end == "turn" else () for role in roles)
    return ViewTokens(tuple(ids), end, jepa.placement, predicted_end)
