# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is to everything else, whether trained here or brought by a checkpoint."""

import abc
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Message:
    role: str
    content: str


class Turn(NamedTuple):
    """Where one turn lies among the tokens of a conversation; half-open ranges."""

    start: int
    """Its first token: the beginning of its header."""
    content: tuple[int, int]
    target: tuple[int, int]
    """What an assistant's turn is trained on: its content with the token that ends the turn; of other roles nothing."""


class View(NamedTuple):
    """One turn as a sequence of its own, without what comes behind its content."""

    tokens: list[int]
    header: int
    """Tokens before the content: the beginning of the sequence and the role's header."""


class Tokenizer(abc.ABC):
    """Token ids of text and of conversations. Immutable; pickles as the files it is made of.

    Text encodes to no control id: a message that holds a control token's spelling stays a message. The ids:
    """

    vocab_size: int
    """One more than the largest id, predictor tokens included: the rows of an embedding that holds them all."""
    fingerprint: str
    """Of everything that ids depend on."""
    pad_id: int
    bos_id: int
    """Before plain text; a chat template has its own beginning."""
    end_of_text_id: int
    """Behind plain text."""
    stop_ids: tuple[int, ...]
    """Generation ends at any of them."""
    mask_id: int
    """Stands for a token taken out; no text encodes to it."""
    predictor_ids: tuple[int, ...]
    """`NUM_RESERVED_PREDICTORS` distinct ids that no text encodes to."""
    new_ids: tuple[int, ...]
    """Those of the ids above that the checkpoint does not have: rows of the embedding that begin as its mean."""
    forbidden_ids: frozenset[int]
    """Ids that generation never chooses."""

    @abc.abstractmethod
    def published_files(self, with_new: bool) -> dict[str, bytes]:
        """By name, the files that belong beside a published model's weights, as `transformers` reads them.

        `with_new` says that the model has rows for `new_ids`, which the files then know; else, and where there are
        none, a checkpoint's are byte for byte as they came.

        Raises:
            UserError: the files cannot hold the new ids.
        """

    @abc.abstractmethod
    def published_ids(self) -> dict[str, int | list[int]]:
        """Those of `TOKEN_IDS` that a published model's `config.json` gives."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, nothing added."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each."""

    @abc.abstractmethod
    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and the character of `text` that each begins with."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids are left out, ids outside the vocabulary too."""

    @abc.abstractmethod
    def piece(self, index: int) -> str:
        """How one id looks, for people."""

    @abc.abstractmethod
    def is_control(self, index: int) -> bool:
        """Whether an id is reserved: never text."""

    @abc.abstractmethod
    def turns(self, messages: Sequence[Message]) -> tuple[list[int], list[Turn]]:
        """Token ids of a conversation, and where each message lies in them.

        Raises:
            UserError: there is no chat template, or it does not show where a message's content lies.
        """

    @abc.abstractmethod
    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the turns before an answer, up to where the answer begins; errors as in `turns`."""

    @abc.abstractmethod
    def view(self, role: str, content: str) -> View:
        """A `user` or `assistant` turn as a sequence of its own; errors as in `turns`."""

    @abc.abstractmethod
    def turn_end(self, role: str) -> int:
        """The control token right behind the content of a turn.

        Raises:
            UserError: the chat template has none there.
        """

    @abc.abstractmethod
    def save(self, directory: pathlib.Path) -> None:
        """Writes the files it is made of into a run's directory, each whole or not at all."""
