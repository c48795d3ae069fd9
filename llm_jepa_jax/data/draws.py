# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on what they are for, and on no order, host or restart."""

import numpy as np


def uniform(seed: int, epoch: int, stream: int, index_N: np.ndarray) -> np.ndarray:
    """float64 [N] in [0, 1), each from (seed, epoch, stream, index) alone (SplitMix64; Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        state_N = np.asarray(index_N, np.uint64)
        for word in (seed, epoch, stream):
            state_N = _mix(state_N + np.uint64((word * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF))
    return (state_N >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(limit_N: np.ndarray, seed: int, epoch: int, stream: int, index_N: np.ndarray) -> np.ndarray:
    """int64 [N] uniform in 0 to limit − 1, drawn as `uniform` draws."""
    return np.floor(uniform(seed, epoch, stream, index_N) * limit_N).astype(np.int64)


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
