# SPDX-License-Identifier: Apache-2.0
"""Thoughts of reasoning models: what an answer has between `<think>` and `</think>`, before what it says."""

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Thinking(NamedTuple):
    """An answer with a thought, cut into parts that are the whole when put together."""

    opening: str
    """`<think>`, if it is there (some prompts open a thought themselves), with white space around."""
    thought: str
    """Without white space around; may be empty."""
    closing: str
    """`</think>` with white space around."""
    answer: str
    """Without white space around."""
    rest: str
    """White space."""


def split_thought(content: str) -> Thinking | None:
    """An answer's parts; None where it has no thought, or where more than one begins or ends."""
    head, close, tail = content.partition(CLOSE)
    if not close or CLOSE in tail:
        return None
    opening = head[: len(head) - len(head.lstrip())]
    if head.startswith(OPEN, len(opening)):
        opening += OPEN
    inner = head[len(opening) :]
    thought, answer = inner.strip(), tail.strip()
    if OPEN in thought:
        return None
    before = inner[: len(inner) - len(inner.lstrip())]
    behind = inner[len(before) + len(thought) :]
    lead = tail[: len(tail) - len(tail.lstrip())]
    return Thinking(opening + before, thought, behind + CLOSE + lead, answer, tail[len(lead) + len(answer) :])


def without_thought(content: str) -> str:
    """What an answer says: the part behind its thought, if it has one."""
    head, close, tail = content.rpartition(CLOSE)
    return tail.lstrip() if close else content
