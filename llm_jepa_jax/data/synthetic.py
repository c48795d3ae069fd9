# SPDX-License-Identifier: Apache-2.0
"""The embedded corpus: descriptions of lines of text, and the regular expressions that match them.

A grammar of our own in the manner of NL-RX (Locascio et al., 2016): nesting, counts, negation `~( )` and conjunction
`&`. Every operator word comes before its operands ("either … or …", "both … and …", "2 or more of …"), so a
description has one reading and determines its expression.

    line   = "lines that" clause [("and" | "or") clause]
    clause = verb unit ["followed by" unit]
    unit   = atom | count unit | "either" unit "or" unit | "both" unit "and" unit | "anything but" unit
"""

import random

from llm_jepa_jax.data.records import Record, exchange
from llm_jepa_jax.errors import UserError

VERSION = "1"
"""Changes with the grammar, so that cached corpora are made anew."""

CLASSES = (
    ("a digit", "[0-9]"),
    ("a capital letter", "[A-Z]"),
    ("a small letter", "[a-z]"),
    ("a letter", "[A-Za-z]"),
    ("a vowel", "[AEIOUaeiou]"),
    ("any character", "."),
)
WORDS = ("apple", "forest", "moon", "river", "stone", "tiger")
VERBS = (
    (("contain", "have"), ".*{}.*"),
    (("start with", "begin with"), "{}.*"),
    (("end with", "finish with"), ".*{}"),
    (("lack", "never have"), "~(.*{}.*)"),
    (("are exactly",), "{}"),
)
MAX_DEPTH = 2
ATTEMPTS_PER_RECORD = 50


def _atom(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return rng.choice(CLASSES)
    word = rng.choice(WORDS)
    return f"the word '{word}'", word


def _count(rng: random.Random) -> tuple[str, str]:
    low = rng.randint(2, 4)
    high = low + rng.randint(1, 2)
    return rng.choice(
        (
            (f"{low} or more of", f"{{{low},}}"),
            (f"exactly {low} of", f"{{{low}}}"),
            (f"between {low} and {high} of", f"{{{low},{high}}}"),
            (f"at most {high} of", f"{{0,{high}}}"),
        )
    )


def _unit(rng: random.Random, depth: int) -> tuple[str, str]:
    """A description and its expression; the expression can stand before and after others."""
    if depth == 0 or rng.random() < 0.5:
        return _atom(rng)
    kind = rng.choice(("count", "count", "either", "both", "but"))
    words, expression = _unit(rng, depth - 1)
    if kind == "count":
        count_words, count = _count(rng)
        return f"{count_words} {words}", f"({expression}){count}"
    if kind == "but":
        return f"anything but {words}", f"~({expression})"
    other_words, other = _unit(rng, depth - 1)
    if kind == "either":
        return f"either {words} or {other_words}", f"({expression}|{other})"
    return f"both {words} and {other_words}", f"({expression}&{other})"


def _clause(rng: random.Random) -> tuple[str, str]:
    verbs, frame = rng.choice(VERBS)
    words, expression = _unit(rng, MAX_DEPTH)
    if rng.random() < 0.2:
        other_words, other = _unit(rng, 1)
        words, expression = f"{words} followed by {other_words}", expression + other
    return f"{rng.choice(verbs)} {words}", frame.format(expression)


def _line(rng: random.Random) -> tuple[str, str]:
    words, expression = _clause(rng)
    if rng.random() < 0.15:
        joint, sign = rng.choice((("and", "&"), ("or", "|")))
        other_words, other = _clause(rng)
        words, expression = f"{words} {joint} {other_words}", f"({expression}){sign}({other})"
    return f"lines that {words}", expression


def generate(num_train: int, num_eval: int, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """The training and the test split: all descriptions and all expressions are distinct, over both splits.

    Raises:
        UserError: the grammar cannot give that many.
    """
    rng = random.Random(seed)
    total = num_train + num_eval
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for _ in range(total * ATTEMPTS_PER_RECORD):
        if len(pairs) == total:
            break
        words, expression = _line(rng)
        if words not in seen and expression not in seen:
            seen |= {words, expression}
            pairs.append((words, expression))
    if len(pairs) < total:
        raise UserError(f"config: `data.synthetic_train`+`data.synthetic_eval`={total}; the grammar gives {len(pairs)}")
    records = [exchange(*pair) for pair in pairs]
    return records[num_eval:], records[:num_eval]
