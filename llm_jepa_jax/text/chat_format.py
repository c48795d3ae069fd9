# SPDX-License-Identifier: Apache-2.0
"""What a chat template puts around turns, learnt from how it renders small conversations."""

import os
import re

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.text.chat_template import ChatTemplate, Laid, TemplateRefusal
from llm_jepa_jax.text.interface import Message
from llm_jepa_jax.text.thoughts import without_thought

QUESTION, ANSWER = Message("user", "question"), Message("assistant", "answer")


class ChatFormat:
    """The text before and behind the contents of user and assistant turns."""

    def __init__(self, template: ChatTemplate, bos_token: str, control: re.Pattern[str]):
        """Renders one turn, two and four; raises `UserError` where the template cannot be understood from them.

        `control` finds control tokens.
        """
        self.template, self._control = template, control
        turns = [QUESTION, ANSWER, Message("user", "other"), Message("assistant", "reply")]
        one, two, four = (template.lay(turns[:count]) for count in (1, 2, 4))
        self.tails = {"user": one.text[one.contents[0][1] :], "assistant": two.text[two.contents[1][1] :]}
        """By role, what comes behind the content of a turn that is the last one."""
        first = one.text[: one.contents[0][0]]
        # A default system block ends as a turn does, and so may the answer before a later question.
        header = self._common_end(first, self._behind_tail(four, 1)).removeprefix(self.tails["user"])
        self.headers = {"user": header, "assistant": self._behind_tail(two, 0)}
        """By role, what comes before the content inside a conversation."""
        self.bos = bos_token if bos_token and first.startswith(bos_token) else ""
        self._before_first = first.removesuffix(self.headers["user"]) if self.headers["user"] else self.bos
        self._first_tail = self.bos if self._before_first.startswith(self.bos) else ""
        self._alone = {"user": self.headers["user"], "assistant": self._alone_header()}

    def _behind_tail(self, laid: Laid, turn: int) -> str:
        """Of what lies between a turn and the next one, the part that begins the next."""
        gap = laid.text[laid.contents[turn][1] : laid.contents[turn + 1][0]]
        return gap[len(self._common_start(gap, self.tails["user" if turn % 2 == 0 else "assistant"])) :]

    def _alone_header(self) -> str | None:
        """What an answer has before it that is the only turn; None where there must be a question before it."""
        try:
            laid = self.template.lay([ANSWER])
        except TemplateRefusal:
            return None
        before = laid.text[: laid.contents[0][0]]
        return before.removeprefix(self._before_first) if before.startswith(self._before_first) else None

    def _common_start(self, first: str, second: str) -> str:
        """The longest text that both begin with; no control token is cut in two."""
        size = len(os.path.commonprefix([first, second]))
        for match in (match for text in (first, second) for match in self._control.finditer(text)):
            if match.start() < size < match.end():
                size = match.start()
        return first[:size]

    def _common_end(self, first: str, second: str) -> str:
        """The longest text that both end with; no control token is cut in two."""
        size = len(os.path.commonprefix([first[::-1], second[::-1]]))
        for text in (first, second):
            for match in self._control.finditer(text):
                if match.start() < len(text) - size < match.end():
                    size = len(text) - match.end()
        return first[len(first) - size :]

    def view(self, role: str, content: str) -> tuple[str, int, int]:
        """The text of one turn alone, without a default system block; and the characters where its content lies.

        It is the turn as the template renders it alone, where it does; else as it stands behind a question. A thought
        that the template leaves out is not in it.
        """
        message = Message(role, content)
        alone = self._alone[role]
        laid = self.template.lay([message] if alone is not None else [QUESTION, message])
        if laid.dropped:
            return self.view(role, without_thought(content))
        header = self.headers[role] if alone is None else alone
        start, end = laid.contents[-1]
        if not laid.text[:start].endswith(header):
            raise UserError(
                f"{self.template.origin}: the chat template begins this {role} turn otherwise than with {header!r}: "
                f"{content[:40]!r}; change that content or the template"
            )
        bos = "" if header.startswith(self.bos) else self.bos
        text = bos + laid.text[start - len(header) :]
        moved = len(bos) + len(header)
        return text, moved, moved + end - start

    def start_of(self, laid: Laid, role: str, content: int, before: tuple[str, int] | None) -> int:
        """The character where a turn begins whose content begins at `content`; `before` are the role of the turn in
        front of it and the end of its content."""
        begin = before[1] if before else 0
        gap, header = laid.text[begin:content], self.headers.get(role, "")
        if header and gap.endswith(header):
            return content - len(header)
        tail = self.tails.get(before[0], "") if before else self._first_tail
        return begin + len(self._common_start(gap, tail))

    def end_of(self, laid: Laid, role: str, content_end: int) -> int:
        """The character where a turn ends whose content ends at `content_end`."""
        return content_end + len(self._common_start(laid.text[content_end:], self.tails[role]))
