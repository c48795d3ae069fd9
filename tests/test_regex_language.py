# SPDX-License-Identifier: Apache-2.0
"""Languages of expressions against a matcher that tries everything, and against Python's `re`."""

import functools
import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_jepa_jax.eval.regex_language import LAST, Arena, TooLarge, inverse, normal
from llm_jepa_jax.eval.regex_parser import NotInDialect, parse

ALPHABET = "ab-"
STRINGS = ["".join(letters) for size in range(5) for letters in itertools.product(ALPHABET, repeat=size)]
ATOMS = st.sampled_from(["a", "b", "-", ".", "[ab]", "[^a]", "()", r"\b"])


def grown(inner):
    """Trees of expressions: (kind, parts…)."""
    two = st.tuples(st.sampled_from(["|", "&", "then"]), inner, inner)
    counts = st.sampled_from(["*", "+", "?", "{2}", "{2,}", "{1,2}"])
    return two | st.tuples(st.just("~"), inner) | st.tuples(counts, inner)


TREES = st.recursive(ATOMS, grown, max_leaves=6)


def spelled(tree):
    """The dialect's text of a tree."""
    if isinstance(tree, str):
        return tree
    kind, *parts = tree
    texts = [f"({spelled(part)})" for part in parts]
    if kind == "~":
        return f"~{texts[0]}"
    return f"{texts[0]}{'' if kind == 'then' else kind}{texts[1]}" if len(texts) == 2 else texts[0] + kind


def is_word(text, place):
    return 0 <= place < len(text) and text[place].isalnum()


@functools.lru_cache(100_000)
def matches(tree, text, start, end):
    """Whether a tree matches `text[start:end]` where it stands, by trying every way to cut it."""
    if isinstance(tree, str):
        if tree == r"\b":
            return start == end and is_word(text, start - 1) != is_word(text, start)
        return bool(re.fullmatch(tree, text[start:end]))
    kind, *parts = tree
    whole = [matches(part, text, start, end) for part in parts]
    if kind in ("|", "&", "~"):
        return {"|": any, "&": all, "~": lambda found: not found[0]}[kind](whole)
    if kind == "then":
        return any(
            matches(parts[0], text, start, cut) and matches(parts[1], text, cut, end) for cut in range(start, end + 1)
        )
    least, most = {"*": (0, 9), "+": (1, 9), "?": (0, 1), "{2}": (2, 2), "{2,}": (2, 9), "{1,2}": (1, 2)}[kind]
    reached = {0: {start}}
    for count in range(most):
        reached[count + 1] = {
            cut for at in reached[count] for cut in range(at, end + 1) if matches(parts[0], text, at, cut)
        }
    return any(end in reached[count] for count in range(least, most + 1))


def accepts(arena, expression, text):
    before = False
    for character in text:
        expression = arena.derivative(expression, ord(character), before)
        before = character.isalnum()
    return arena.nullable(expression, before, False)


@settings(max_examples=150, deadline=None)
@given(TREES)
@example(("then", ("{2}", ("|", r"\b", "a")), "b"))
@example(("then", ("{2,}", ("|", r"\b", "a")), ("then", r"\b", "-")))
@example(("~", ("then", r"\b", ("&", ("*", "."), ("then", ".", r"\b")))))
def test_a_language_holds_what_a_matcher_finds(tree):
    arena = Arena()
    expression = parse(spelled(tree), arena)
    for text in STRINGS:
        assert accepts(arena, expression, text) == matches(tree, text, 0, len(text)), (spelled(tree), text)


@settings(max_examples=150, deadline=None)
@given(TREES, TREES)
@example(("then", "a", ("then", r"\b", "b")), ("&", "a", "b"))
@example(("~", "[ab]"), ("*", "-"))
def test_a_difference_is_one_and_the_shortest(one, other):
    arena = Arena()
    two = [parse(spelled(tree), arena) for tree in (one, other)]
    try:
        example = arena.difference(*two, most_pairs=500)
    except TooLarge:
        return
    differing = [
        text for text in STRINGS if matches(one, text, 0, len(text)) != matches(other, text, 0, len(text))
    ]  # shortest first
    if example is None:
        assert not differing
    else:
        assert matches(one, example, 0, len(example)) != matches(other, example, 0, len(example))
        # Letters that no string here has may make it shorter, as in `~[ab]` against `-*`.
        assert not differing or len(example) <= len(differing[0])
        assert example not in STRINGS or len(example) == len(differing[0])


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.sampled_from(["a", "b", ".", "[^b]"]), lambda inner: st.tuples(
    st.sampled_from(["*", "+", "?", "{2}", "{2,}", "{1,2}"]), inner) | st.tuples(st.sampled_from(["|", "then"]), inner,
    inner), max_leaves=5))  # fmt: skip
def test_plain_expressions_are_those_of_python(tree):
    arena = Arena()
    expression = parse(spelled(tree), arena)
    for text in STRINGS[:60]:
        assert accepts(arena, expression, text) == bool(re.fullmatch(spelled(tree), text)), (spelled(tree), text)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted).map(tuple), max_size=6))
def test_ranges_are_sets(ranges):
    points = {point for first, last in ranges for point in range(first, last + 1)}
    found = normal(ranges)
    assert {point for first, last in found for point in range(first, last + 1)} == points
    assert all(one[1] + 1 < other[0] for one, other in itertools.pairwise(found))
    rest = inverse(found)
    assert normal([*found, *rest]) == ((0, LAST),) and inverse(rest) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a)", r"at character 2: '\)' is not expected"),
        ("(a", r"at character 3: '\)' is missing"),
        ("a|", "at character 3: the expression ends too early"),
        ("a**{3", "at character 6: '}' is missing"),
        ("\\q", r"at character 2: the dialect has no escape \\q"),
        ("x" * 1001, "longer than 1000 characters"),
        ("(" * 61 + "a" + ")" * 61, "nested deeper than 60"),
    ],
)
def test_what_is_not_in_the_dialect_says_where(text, words):
    with pytest.raises(NotInDialect, match=words):
        parse(text, Arena())


def test_the_data_sets_expressions_are_read_and_equal_themselves(shared_dir):
    """Every twentieth target, with its classes spelled in another way."""
    import json

    lines = (shared_dir / "data" / "synth_test.jsonl").read_text().splitlines()[::20]
    for line in lines:
        target = json.loads(line)["messages"][-1]["content"]
        arena = Arena()
        other = target.replace("[AEIOUaeiou]", "([AEIOU]|[aeiou])").replace(".*", "(.*)(.*)")
        assert arena.difference(parse(target, arena), parse(other, arena)) is None, target
