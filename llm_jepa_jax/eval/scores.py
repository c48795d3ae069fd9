# SPDX-License-Identifier: Apache-2.0
"""What a task's verdicts come to: its score with a 95% confidence interval, and every count."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jepa_jax.eval.task import Verdict

Z95 = 1.959963984540054
"""The 97.5% point of the normal distribution."""
RESAMPLES = 2000
RESULT = "result.json"
"""The last line of output as a file: of a run that has done all its steps and its last evaluation."""


def wilson(right: float, asked: int) -> tuple[float, float]:
    """Of a share of right answers (Wilson, 1927): lower and upper end, 0 and 1 where nothing was asked."""
    if not asked:
        return 0.0, 1.0
    share, z2 = right / asked, Z95**2
    middle = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    half = Z95 / (1 + z2 / asked) * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked**2))
    # At the ends the exact interval begins at 0 or ends at 1; rounding must not say otherwise.
    return 0.0 if not right else max(0.0, middle - half), 1.0 if right == asked else min(1.0, middle + half)


def bootstrap_ratio(sums_N: np.ndarray, weights_N: np.ndarray) -> tuple[float, float]:
    """Of sum(sums) / sum(weights), records drawn anew with replacement (percentiles; the same draws every time)."""
    rng = np.random.default_rng(0)
    ratios = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        chosen = rng.integers(0, len(sums_N), len(sums_N))
        ratios[number] = sums_N[chosen].sum() / weights_N[chosen].sum()
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Score:
    """One task's result."""

    task: str
    value: float
    low: float
    high: float
    """Ends of the interval."""
    asked: int
    words: dict[str, int]
    """How many verdicts of each word; empty where records are not judged."""
    skipped: dict[str, int]
    """How many records were not asked, by reason."""
    share: bool = True
    """Between 0 and 1, higher is better; else a perplexity."""

    def metrics(self) -> dict[str, float]:
        """For `metrics.jsonl`: the score under the task's name, the rest behind it."""
        values = {
            "": self.value, "_low": self.low, "_high": self.high, "_asked": self.asked,
            "_skipped": sum(self.skipped.values()),
        }  # fmt: skip
        values |= {f"_{word}": self.words.get(word, 0) for word in ("unparsed", "undecided") if self.share}
        return {self.task + end: value for end, value in values.items()}

    def summary(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        unit, factor = ("%", 100.0) if self.share else ("", 1.0)
        parts = [f"{self.task} {factor * self.value:.1f}{unit} of {self.asked}"]
        parts[0] += f" (95%: {factor * self.low:.1f} to {factor * self.high:.1f})"
        parts += [f"{self.words[word]} {word}" for word in ("unparsed", "undecided") if self.words.get(word)]
        parts += [f"{count} skipped: {reason}" for reason, count in sorted(self.skipped.items())]
        return "; ".join(parts)


def judged(task: str, verdicts: Sequence[Verdict], skipped: dict[str, int]) -> Score:
    """Mean credit (0 of nothing); Wilson's interval, or the bootstrap's where credits lie between 0 and 1."""
    credits_N = np.array([verdict.credit for verdict in verdicts])
    words = dict(collections.Counter(verdict.word for verdict in verdicts))
    if "partly" in words:
        low, high = bootstrap_ratio(credits_N, np.ones(len(credits_N)))
    else:
        low, high = wilson(float(credits_N.sum()), len(credits_N))
    return Score(task, float(credits_N.sum()) / max(1, len(credits_N)), low, high, len(credits_N), words, skipped)


def perplexity(task: str, losses_N: np.ndarray, tokens_N: np.ndarray, skipped: dict[str, int]) -> Score:
    """exp of the mean loss a token, from each record's sum of −log p and number of tokens; the bootstrap's interval."""
    if not len(losses_N):
        return Score(task, math.inf, 0.0, math.inf, 0, {}, skipped, share=False)
    with np.errstate(over="ignore"):  # a model that has diverged has an infinite one
        value, low, high = np.exp([losses_N.sum() / tokens_N.sum(), *bootstrap_ratio(losses_N, tokens_N)]).tolist()
    return Score(task, value, low, high, len(losses_N), {}, skipped, share=False)
