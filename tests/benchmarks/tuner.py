# SPDX-License-Identifier: Apache-2.0
"""How good the settings are that `--tune` finds on simulated grids, beside the whole grid's and random ones.

`python tests/benchmarks/tuner.py`

A JSON line for each grid: mean loss to the truly best setting of what each picks, and the share of the grid's runs.
"""

import argparse
import itertools
import json

import numpy as np

from llm_jepa_jax.sweep.tuner import tune

CASES = (
    {"shape": (5, 4), "seeds": 5, "noise": 1.5},
    {"shape": (5, 4), "seeds": 5, "noise": 3.0},
    {"shape": (5, 4), "seeds": 1, "noise": 1.0},
    {"shape": (3, 3), "seeds": 5, "noise": 1.0},
    {"shape": (11, 6), "seeds": 5, "noise": 2.0},
)


def surface(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth hill somewhere in the grid, with bumps: what settings are worth."""
    centre, width = [rng.uniform(-0.5, size - 0.5) for size in shape], rng.uniform(1.0, 3.0, len(shape))
    places = np.array(list(itertools.product(*map(range, shape))))
    hill = 10 * np.exp(-0.5 * (((places - centre) / width) ** 2).sum(axis=1)) + rng.normal(0, 0.3, len(places))
    return hill.reshape(shape)


def trial(number: int, shape: tuple[int, ...], seeds: int, noise: float) -> dict[str, float]:
    """What each picks on one grid, less the best there is; seeds add something of their own to every setting."""
    rng = np.random.default_rng(number)
    worth = surface(rng, shape)
    scores = worth[..., None] + rng.normal(0, 1.5, seeds) + rng.normal(0, noise, (*shape, seeds))
    tuned = tune(shape, seeds, lambda wanted: [scores[(*place, seed)] for place, seed in wanted])
    places = list(itertools.product(*map(range, shape)))
    count = max(1, tuned.grid_runs // 3 // seeds)
    drawn = [places[i] for i in rng.choice(len(places), count, replace=False)]
    picks = {
        "tuner": tuned.best, "grid": max(places, key=lambda place: scores[place].mean()),
        "random third": max(drawn, key=lambda place: scores[place].mean()),
    }  # fmt: skip
    lost = {name: float(worth.max() - worth[place]) for name, place in picks.items()}
    return lost | {"share of runs": tuned.runs / tuned.grid_runs, "height": float(np.ptp(worth))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    trials = parser.parse_args().trials
    for case in CASES:
        found = [trial(number, **case) for number in range(trials)]
        means = {name: round(float(np.mean([each[name] for each in found])), 3) for name in found[0]}
        most = round(max(each["share of runs"] for each in found), 3)
        print(json.dumps(case | {"trials": trials} | means | {"largest share": most}), flush=True)


if __name__ == "__main__":
    main()
