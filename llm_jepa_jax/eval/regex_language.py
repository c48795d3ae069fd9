# SPDX-License-Identifier: Apache-2.0
"""Do two regular expressions, with complement and intersection, describe the same strings?

Decided by derivatives (Brzozowski, 1964): what an expression still allows behind a first character is an expression
again, and with unions and intersections kept as sets there are finitely many. Two languages are equal if no string
leads to a pair of which only one may end; the shortest such string is found breadth first. Complement and intersection
cost nothing there, which is why this is not done through non-deterministic automata. A word boundary is a matter of the
characters on both sides, so derivatives know whether the character before was of a word.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

Ranges = tuple[tuple[int, int], ...]
"""Code points, both ends included, in order and apart."""
Expression = int
"""Number of an expression in its `Arena`."""
LAST = 0x10FFFF
WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
"""Characters of words: digits, letters, underscore, as ASCII has them."""
MOST_PAIRS = 20_000
MOST_WORK = 2_000_000
"""Members of unions, intersections and concatenations built in one arena: a second or two."""


class TooLarge(Exception):  # noqa: N818 - an outcome, not a fault
    """The comparison needs more than its limits allow."""


def normal(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same code points, in order and apart."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)


def inverse(ranges: Ranges) -> Ranges:
    """All other code points."""
    firsts = [0, *(last + 1 for _, last in ranges)]
    lasts = [*(first - 1 for first, _ in ranges), LAST]
    return tuple((first, last) for first, last in zip(firsts, lasts, strict=True) if first <= last)


class Arena:
    """Expressions, each distinct one once; equal numbers mean equal languages, not the other way round."""

    def __init__(self, most_work: int = MOST_WORK):
        self._keys: list[tuple] = []
        self._numbers: dict[tuple, Expression] = {}
        self._derivatives: dict[tuple[Expression, int, bool], Expression] = {}
        self._nullable: dict[tuple[Expression, bool, bool], bool] = {}
        self._work_left = most_work
        self.nothing = self._make("or")
        """No string at all."""
        self.empty = self._make("empty")
        """The empty string."""
        self.boundary = self._make("boundary")
        self._has_boundary = False
        self.any_character = self.characters(((0, LAST),))
        self.everything = self._make("repeat", self.any_character, 0, None)

    def _make(self, *key: object) -> Expression:
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._keys)
            self._keys.append(key)
        return number

    def _spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise TooLarge("the expressions become too many")

    def characters(self, ranges: Ranges) -> Expression:
        """One character of these."""
        return self._make("set", normal(ranges)) if ranges else self.nothing

    def word_boundary(self) -> Expression:
        self._has_boundary = True
        return self.boundary

    def union(self, parts: Iterable[Expression]) -> Expression:
        members, sets = self._members("or", parts)
        if sets:
            members.add(self.characters(normal(r for ranges in sets for r in ranges)))
        if self.everything in members or any(self.complement(m) in members for m in members if self._is("not", m)):
            return self.everything
        return members.pop() if len(members) == 1 else self._make("or", *sorted(members))

    def intersection(self, parts: Iterable[Expression]) -> Expression:
        members, sets = self._members("and", parts)
        if sets:
            outside = normal(r for ranges in sets for r in inverse(ranges))
            members.add(self.characters(inverse(outside)))
        members.discard(self.everything)
        if self.nothing in members or any(self.complement(m) in members for m in members if self._is("not", m)):
            return self.nothing
        if not members:
            return self.everything
        return members.pop() if len(members) == 1 else self._make("and", *sorted(members))

    def _members(self, kind: str, parts: Iterable[Expression]) -> tuple[set[Expression], list[Ranges]]:
        """Members of a union or intersection without those of its own kind, and apart from them its sets of
        characters."""
        members: set[Expression] = set()
        for part in parts:
            members.update(self._keys[part][1:] if self._is(kind, part) else [part])
        self._spend(1 + len(members))
        sets = {member for member in members if self._is("set", member)}
        return members - sets, [self._keys[member][1] for member in sorted(sets)]

    def _is(self, kind: str, expression: Expression) -> bool:
        return self._keys[expression][0] == kind

    def complement(self, inner: Expression) -> Expression:
        if self._is("not", inner):
            return self._keys[inner][1]
        if inner == self.nothing:
            return self.everything
        return self.nothing if inner == self.everything else self._make("not", inner)

    def concatenation(self, parts: Iterable[Expression]) -> Expression:
        """One behind the other, kept as (first, rest)."""
        flat = [inner for part in parts for inner in self._chain(part)]
        self._spend(len(flat))
        if self.nothing in flat:
            return self.nothing
        whole = self.empty
        for part in reversed(flat):
            if part == self.empty:
                continue
            first = self._keys[whole][1] if self._is("then", whole) else whole
            if part == first and self._keys[part][0] == "repeat" and self._keys[part][2:] == (0, None):
                continue  # x* x* is x*
            whole = part if whole == self.empty else self._make("then", part, whole)
        return whole

    def _chain(self, expression: Expression) -> Iterator[Expression]:
        while self._is("then", expression):
            _, first, expression = self._keys[expression]
            yield first
        yield expression

    def repeat(self, inner: Expression, least: int, most: int | None) -> Expression:
        if most == 0 or inner == self.empty or (inner == self.nothing and least == 0):
            return self.empty
        is_star = self._is("repeat", inner) and self._keys[inner][2:] == (0, None)
        if (least == 1 and most == 1) or inner == self.nothing or is_star:
            return inner
        return self._make("repeat", inner, least, most)

    def nullable(self, expression: Expression, before: bool, behind: bool) -> bool:
        """Whether the empty string is allowed where the character before is of a word, and the one behind."""
        key = (expression, before, behind) if self._has_boundary else (expression, False, False)
        if key not in self._nullable:
            self._nullable[key] = self._find_nullable(*key)
        return self._nullable[key]

    def _find_nullable(self, expression: Expression, before: bool, behind: bool) -> bool:
        kind, *parts = self._keys[expression]
        match kind:
            case "or":
                return any(self.nullable(part, before, behind) for part in parts)
            case "and":
                return all(self.nullable(part, before, behind) for part in parts)
            case "then":
                return all(self.nullable(part, before, behind) for part in self._chain(expression))
            case "not":
                return not self.nullable(parts[0], before, behind)
            case "repeat":
                return parts[1] == 0 or self.nullable(parts[0], before, behind)
            case "boundary":
                return before != behind
        return bool(kind == "empty")

    def derivative(self, expression: Expression, character: int, before: bool) -> Expression:
        """What may follow `character`, a code point; `before`: the character before that one is of a word."""
        key = (expression, character, before and self._has_boundary)
        if key not in self._derivatives:
            self._derivatives[key] = self._derive(*key)
        return self._derivatives[key]

    def _derive(self, expression: Expression, character: int, before: bool) -> Expression:
        kind, *parts = self._keys[expression]
        behind = within(character, WORD)
        match kind:
            case "set":
                return self.empty if within(character, parts[0]) else self.nothing
            case "or":
                return self.union([self.derivative(part, character, before) for part in parts])
            case "and":
                return self.intersection([self.derivative(part, character, before) for part in parts])
            case "not":
                return self.complement(self.derivative(parts[0], character, before))
            case "then":
                found = []
                while self._is("then", expression):
                    _, first, rest = self._keys[expression]
                    found.append(self.concatenation([self.derivative(first, character, before), rest]))
                    expression = rest
                    if not self.nullable(first, before, behind):
                        return self.union(found)
                return self.union([*found, self.derivative(expression, character, before)])
            case "repeat":
                inner, least, most = parts
                # Where the inner expression may be empty here, any number of the copies asked for are.
                least = 0 if self.nullable(inner, before, behind) else max(0, least - 1)
                rest = self.repeat(inner, least, None if most is None else most - 1)
                return self.concatenation([self.derivative(inner, character, before), rest])
        return self.nothing

    def representatives(self) -> list[int]:
        """One code point of each class that no set of the expressions made so far tells apart."""
        sets = [key[1] for key in self._keys if key[0] == "set"] + ([WORD] if self._has_boundary else [])
        cuts = sorted({0} | {cut for ranges in sets for first, last in ranges for cut in (first, last + 1)})
        classes: dict[tuple[bool, ...], int] = {}
        for first, following in zip(cuts, [*cuts[1:], LAST + 1], strict=True):
            if first <= LAST:
                shown = ord("!") if first < ord("!") < following else first
                classes.setdefault(tuple(within(first, ranges) for ranges in sets), shown)
        return list(classes.values())

    def difference(self, one: Expression, other: Expression, most_pairs: int = MOST_PAIRS) -> str | None:
        """A shortest string that only one of two expressions allows; None where they allow the same.

        Raises:
            TooLarge: the limits were reached before that was known.
        """
        characters = self.representatives()
        start = (one, other, False)
        reached: dict[tuple[Expression, Expression, bool], tuple[Any, int]] = {start: (None, 0)}
        waiting = collections.deque([start])
        while waiting:
            first, second, before = pair = waiting.popleft()
            if self.nullable(first, before, False) != self.nullable(second, before, False):
                return _spelled(pair, reached)
            for character in characters:
                ahead, other_ahead = (self.derivative(side, character, before) for side in (first, second))
                following = (ahead, other_ahead, self._has_boundary and within(character, WORD))
                if ahead != other_ahead and following not in reached:
                    if len(reached) >= most_pairs:
                        raise TooLarge(f"more than {most_pairs} pairs of states")
                    reached[following] = (pair, character)
                    waiting.append(following)
        return None


def _spelled(pair: Any, reached: dict[Any, tuple[Any, int]]) -> str:
    """The string that led to a pair."""
    characters = []
    while reached[pair][0] is not None:
        pair, character = reached[pair]
        characters.append(chr(character))
    return "".join(reversed(characters))


def within(character: int, ranges: Ranges) -> bool:
    """Whether a code point is among these."""
    return any(first <= character <= last for first, last in ranges)
