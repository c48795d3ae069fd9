# SPDX-License-Identifier: Apache-2.0
"""Finds a good setting of a grid with at most a third of its runs: successive halving over seeds, guided by neighbours.

The published grids over (k, λ) are smooth: what is good lies beside what is good. So a coarse part of the grid is tried
with one seed; a Gaussian process with a smooth kernel says what every setting is probably worth, tried or not; and
rounds give one more seed to the better half of those tried, and a first one to untried neighbours that promise most.
(Jamieson & Talwalkar, arXiv 1502.07943, halve over training length; a schedule cut short is another schedule, so seeds
are what is halved over here.) Runs are points of the whole sweep: a grid that is run later finds them done.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

Place = tuple[int, ...]
"""Indices of a setting along the grid's axes."""
Observed = Mapping[Place, Sequence[float]]
"""Scores of the seeds that a setting was tried with, in the order of seeds; higher is better."""
SHARE = 1 / 3
"""Of the grid's runs."""
LENGTHS = (0.7, 3.0)
"""Bounds of the kernel's length, in steps of the grid."""
NOISE = 0.3
"""Standard deviation between seeds, as a share of that between settings, until two seeds of one setting are known."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a search has come to."""

    best: Place | None
    """None: every run failed."""
    runs: int
    grid_runs: int
    history: tuple[tuple[tuple[Place, int], ...], ...]
    """What each round tried: (setting, which seed)."""


def tune(
    shape: Sequence[int], num_seeds: int, score: Callable[[Sequence[tuple[Place, int]]], Sequence[float | None]]
) -> Tuned:
    """The setting that is probably best.

    `shape` is the grid's; `score` runs (setting, which seed) pairs together and returns their scores, None where a run
    failed (its setting is then left alone).
    """
    places = list(itertools.product(*map(range, shape)))
    budget = int(len(places) * num_seeds * SHARE)
    observed: dict[Place, list[float]] = {}
    failed: set[Place] = set()
    history = []
    wanted = [(place, 0) for place in coarse(shape, budget)][:budget]
    spent = 0
    while wanted:
        for (place, _), found in zip(wanted, score(wanted), strict=True):
            if found is None or not math.isfinite(found):
                failed.add(place)
            else:
                observed.setdefault(place, []).append(found)
        spent += len(wanted)
        history.append(tuple(wanted))
        usable = {place: scores for place, scores in observed.items() if place not in failed}
        wanted = next_round(places, usable, failed, num_seeds, budget - spent)
    usable = {place: scores for place, scores in observed.items() if place not in failed}
    return Tuned(winner(usable) if usable else None, spent, len(places) * num_seeds, tuple(history))


def coarse(shape: Sequence[int], budget: int) -> list[Place]:
    """The first round: every other index of each axis, both ends among them; fewer where that were half the budget."""
    axes = [np.unique(np.linspace(0, size - 1, -(-size // 2)).round().astype(int)).tolist() for size in shape]
    if 2 * math.prod(map(len, axes)) > budget:
        counts = [-(-size // 3) for size in shape]
        axes = [[(2 * i + 1) * size // (2 * n) for i in range(n)] for size, n in zip(shape, counts, strict=True)]
    return list(itertools.product(*axes))


def _without_seeds(observed: Observed) -> dict[Place, list[float]]:
    """Scores less what a seed adds for every setting: later seeds are tried by the better settings alone.

    What a seed adds is its mean difference to the first one, drawn to zero where few settings say it.
    """
    most = max(len(scores) for scores in observed.values())
    adds = [0.0]
    for number in range(1, most):
        differences = [scores[number] - scores[0] for scores in observed.values() if len(scores) > number]
        adds.append(sum(differences) / (len(differences) + 1))
    return {place: [a - b for a, b in zip(scores, adds, strict=False)] for place, scores in observed.items()}


def next_round(
    places: Sequence[Place], observed: Observed, failed: set[Place], num_seeds: int, budget: int
) -> list[tuple[Place, int]]:
    """What to try next, within the budget; nothing where the better settings have all seeds."""
    if not observed:
        return []
    means, spreads = estimate(places, observed)
    worth = {place: mean for place, mean in zip(places, means, strict=True)}
    hope = {place: mean + spread for place, mean, spread in zip(places, means, spreads, strict=True)}
    tried = sorted(observed, key=lambda place: -worth[place])
    fewest = max(len(scores) for scores in observed.values())
    better = tried[: max(1, math.ceil(len(tried) / 2 ** min(fewest, 8)))]
    around = [place for place in places if place not in observed and place not in failed]
    around = [place for place in around if any(_beside(place, other) for other in tried[:2])]
    around = [place for place in around if hope[place] > worth[tried[0]]]
    around = sorted(around, key=lambda place: -hope[place])[: len(better) + 1]
    more = [place for place in better if len(observed[place]) < num_seeds]
    # What is kept apart for the leader: all its seeds, so that its mean is as good as the grid's.
    wanted = [(place, 0) for place in around] + [(place, len(observed[place])) for place in more]
    reserve = max(0, num_seeds - len(observed[tried[0]]) - 1)
    if len(wanted) + reserve > budget:
        wanted = [(tried[0], n) for n in range(len(observed[tried[0]]), num_seeds)]
    return wanted[: max(0, budget)]


def _beside(first: Place, second: Place) -> bool:
    """They differ by one step along each axis at most."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 1


def estimate(places: Sequence[Place], observed: Observed) -> tuple[np.ndarray, np.ndarray]:
    """What settings are worth by all that was seen: mean and standard deviation at each place."""
    observed = _without_seeds(observed)
    known = list(observed)
    means = np.array([np.mean(observed[place]) for place in known])
    centre, scale = means.mean(), means.std() or 1.0
    scatter = [np.var(scores, ddof=1) for scores in observed.values() if len(scores) > 1]
    noise = np.mean(scatter) / scale**2 if scatter else NOISE**2
    alpha = np.array([max(noise, 1e-6) / len(observed[place]) for place in known])
    kernel = ConstantKernel(1.0, (0.1, 10.0)) * RBF(1.5, LENGTHS)
    process = GaussianProcessRegressor(kernel, alpha=alpha, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a bound is where the length may well end
        process.fit(np.array(known, float), (means - centre) / scale)
    mean, spread = process.predict(np.array(places, float), return_std=True)
    return centre + scale * mean, scale * spread


def winner(observed: Observed) -> Place:
    """Of the settings with the most seeds, the one that is worth most by its own scores and its neighbours'."""
    places = list(observed)
    worth = dict(zip(places, estimate(places, observed)[0], strict=True))
    most = max(len(scores) for scores in observed.values())
    return max((place for place in places if len(observed[place]) == most), key=lambda place: worth[place])
