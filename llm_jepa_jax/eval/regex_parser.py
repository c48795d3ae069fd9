# SPDX-License-Identifier: Apache-2.0
"""The dialect of NL-RX (Locascio et al., 2016) read into an `Arena` of `regex_language`.

Its grammar and precedence are those of dk.brics.automaton, with which the data set was made: `|` binds least, then `&`
(intersection), concatenation, repetition (`*`, `+`, `?`, `{n}`, `{n,}`, `{n,m}`), and `~` (complement) most, so
`~(a){3,}` repeats the complement. Beside that: `.` is any character, `[a-z]` and `[^a-z]` classes, `()` the empty
string, `\\b` a word boundary, and a backslash makes punctuation a character.
"""

import string

from llm_jepa_jax.eval.regex_language import Arena, Expression, inverse, normal

LONGEST = 1000
"""Characters of an expression that is read."""
DEEPEST = 60
"""Nested parentheses and complements."""
LARGEST_COUNT = 200
RESERVED = "|&~()[]{}*+?\\^$"


class NotInDialect(ValueError):
    """The text is no expression of the dialect; says where."""


def parse(text: str, arena: Arena) -> Expression:
    """The expression that `text`, outer white space aside, stands for.

    Raises:
        NotInDialect: it is none, or too large to be read.
    """
    text = text.strip()
    if len(text) > LONGEST:
        raise NotInDialect(f"longer than {LONGEST} characters")
    reader = _Reader(text, arena)
    expression = reader.union(0)
    if reader.at < len(text):
        raise reader.error(f"{text[reader.at]!r} is not expected")
    return expression


class _Reader:
    """Recursive descent over one text."""

    def __init__(self, text: str, arena: Arena):
        self.text, self.at, self.arena = text, 0, arena

    def error(self, what: str) -> NotInDialect:
        return NotInDialect(f"at character {self.at + 1}: {what}")

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, mark: str) -> bool:
        if self.peek() != mark:
            return False
        self.at += 1
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise self.error(f"{mark!r} is missing")

    def union(self, depth: int) -> Expression:
        parts = [self.intersection(depth)]
        while self.take("|"):
            parts.append(self.intersection(depth))
        return self.arena.union(parts)

    def intersection(self, depth: int) -> Expression:
        parts = [self.concatenation(depth)]
        while self.take("&"):
            parts.append(self.concatenation(depth))
        return self.arena.intersection(parts)

    def concatenation(self, depth: int) -> Expression:
        parts = [self.repetition(depth)]
        while self.peek() not in ("", "|", "&", ")"):
            parts.append(self.repetition(depth))
        return self.arena.concatenation(parts)

    def repetition(self, depth: int) -> Expression:
        expression = self.complement(depth)
        while True:
            if self.take("*"):
                expression = self.arena.repeat(expression, 0, None)
            elif self.take("+"):
                expression = self.arena.repeat(expression, 1, None)
            elif self.take("?"):
                expression = self.arena.repeat(expression, 0, 1)
            elif self.take("{"):
                expression = self.arena.repeat(expression, *self.counts())
            else:
                return expression

    def counts(self) -> tuple[int, int | None]:
        least = self.number()
        most: int | None = least
        if self.take(","):
            most = None if self.peek() == "}" else self.number()
        self.expect("}")
        if most is not None and most < least:
            raise self.error(f"{{{least},{most}}} is no range")
        return least, most

    def number(self) -> int:
        start = self.at
        while self.peek() in tuple(string.digits):
            self.at += 1
        digits = self.text[start : self.at]
        if not digits or len(digits) > 9 or int(digits) > LARGEST_COUNT:
            raise self.error(f"a count is a number up to {LARGEST_COUNT}")
        return int(digits)

    def complement(self, depth: int) -> Expression:
        if depth > DEEPEST:
            raise self.error(f"nested deeper than {DEEPEST}")
        if self.take("~"):
            return self.arena.complement(self.complement(depth + 1))
        if self.take("("):
            if self.take(")"):
                return self.arena.empty
            inner = self.union(depth + 1)
            self.expect(")")
            return inner
        if self.take("["):
            return self.character_class()
        if self.take("."):
            return self.arena.any_character
        if self.take("\\"):
            return self.escape()
        character = self.peek()
        if not character or character in RESERVED:
            raise self.error(f"{character!r} is not expected" if character else "the expression ends too early")
        self.at += 1
        return self.arena.characters(((ord(character), ord(character)),))

    def escape(self) -> Expression:
        """What a backslash, already read, stands before."""
        if self.take("b"):
            return self.arena.word_boundary()
        code = self.punctuation()
        return self.arena.characters(((code, code),))

    def punctuation(self) -> int:
        character = self.peek()
        if not character or character not in string.punctuation:
            raise self.error(f"the dialect has no escape \\{character}")
        self.at += 1
        return ord(character)

    def character_class(self) -> Expression:
        """A class whose `[` is already read."""
        negated = self.take("^")
        ranges = []
        while not self.take("]"):
            first = last = self.class_character()
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self.class_character()
            if last < first:
                raise self.error(f"{chr(first)}-{chr(last)} is no range")
            ranges.append((first, last))
        if not ranges:
            raise self.error("the class is empty")
        return self.arena.characters(inverse(normal(ranges)) if negated else normal(ranges))

    def class_character(self) -> int:
        if self.take("\\"):
            return self.punctuation()
        character = self.peek()
        if not character:
            raise self.error("']' is missing")
        self.at += 1
        return ord(character)
