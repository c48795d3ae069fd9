# SPDX-License-Identifier: Apache-2.0
"""Is Enc(Code) a linear function of Enc(Text)? Least squares on half of the pairs, tried on the other half.

LLM-JEPA (arXiv 2509.14252, section 4.2) fits all pairs and reports the error on them. With fewer pairs than some
multiple of the width, that error is small for any two clouds of points; so half is held out here, and codes that have
nothing to do with their texts are fitted beside it.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from llm_jepa_jax.analysis.geometry import mismatched

NOISE = float(np.finfo(np.float32).eps)
"""Embeddings are float32: directions weaker than this share of their Frobenius norm are rounding."""


class Error(NamedTuple):
    """What a fitted map leaves, as a share of the variance around the fitted half's mean: 1 − R² of all dimensions.

    0: the map is exact; 1: no better than the mean; above 1: worse than it.
    """

    train: float
    held_out: float


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """The map from text to code, and what the same fit makes of codes that do not belong to the texts."""

    pairs: Error
    permuted: Error
    """Codes of other pairs."""
    gaussian: Error
    """Codes drawn from the normal distribution with the codes' mean and covariance."""
    rms: Error
    """Of the pairs: root mean square of ‖map(text) − code‖, in the embeddings' unit; not a share."""
    rank: int
    """Dimensions of the text view above float32's rounding; weaker ones are cut off."""
    num_train: int
    num_held_out: int
    width: int

    @property
    def too_few(self) -> bool:
        """Fewer pairs fitted than twice the width: the error on them then says nothing."""
        return self.num_train < 2 * self.width


def halves(*keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """int64 indices of the pairs to fit and of those to hold out, about as many each, drawn with a fixed seed.

    Pairs that share a key (each sequence has one for every pair, such as its record or its text) stay together, so
    that no held-out text has been fitted. One of the halves is empty where all belong together.
    """
    number = len(keys[0])
    rows, columns, offset = [], [], 0
    for names in keys:
        ids = {name: index for index, name in enumerate(dict.fromkeys(names))}
        rows.append(np.arange(number))
        columns.append(np.array([ids[name] for name in names], np.int64) + number + offset)
        offset += len(ids)
    edges = (np.ones(number * len(keys)), (np.concatenate(rows), np.concatenate(columns)))
    size = number + offset
    _, labels = connected_components(coo_array(edges, shape=(size, size)), directed=False)
    groups_P, sizes_G = np.unique(labels[:number], return_inverse=True, return_counts=True)[1:]
    order_G = np.random.default_rng(0).permutation(len(sizes_G))
    before_G = np.cumsum(sizes_G[order_G]) - sizes_G[order_G]
    fitted_P = np.isin(groups_P, order_G[before_G < number / 2])
    return np.flatnonzero(fitted_P), np.flatnonzero(~fitted_P)


def linear_map(
    text_PxD: np.ndarray, code_PxD: np.ndarray, train: np.ndarray, held_out: np.ndarray, seed: int
) -> LinearMap:
    """Fits code ≈ text W + b on the pairs `train` by least squares (minimum norm, directions below float32's rounding
    cut off), and measures it on them and on `held_out`.

    b takes the shared mean out: embeddings of language models point mostly one way, so a map without it would look
    exact for any codes.
    """
    text_PxD, code_PxD = np.asarray(text_PxD, np.float64), np.asarray(code_PxD, np.float64)
    fit = _Fit(text_PxD[train])
    parts = ((text_PxD[train], code_PxD[train]), (text_PxD[held_out], code_PxD[held_out]))
    permuted = [(text, code[mismatched(len(code), seed)]) for text, code in parts]
    drawn_PxD = _gaussian(code_PxD[train], len(code_PxD), seed)
    gaussian = [(text_PxD[train], drawn_PxD[train]), (text_PxD[held_out], drawn_PxD[held_out])]
    shares = [_error(fit, *both) for both in (parts, permuted, gaussian)]
    residuals = fit.residuals(*parts)
    rms = Error(*(float(np.sqrt(np.square(left).sum(axis=1).mean())) for left in residuals))
    return LinearMap(*shares, rms, fit.rank, len(train), len(held_out), text_PxD.shape[1])


class _Fit:
    """One SVD of the texts that are fitted, for any codes."""

    def __init__(self, text_NxD: np.ndarray):
        self.mean_D = text_NxD.mean(axis=0)
        left_NxK, singular_K, right_KxD = np.linalg.svd(text_NxD - self.mean_D, full_matrices=False)
        kept = singular_K > NOISE * np.linalg.norm(text_NxD)
        self.rank = int(kept.sum())
        self._left_NxK = left_NxK[:, kept]
        self._inverse_DxK = right_KxD[kept].T / singular_K[kept]

    def residuals(
        self, train: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is left of both halves' codes, fitted to the first."""
        mean_D = train[1].mean(axis=0)
        weights_DxD = self._inverse_DxK @ (self._left_NxK.T @ (train[1] - mean_D))
        left = [code - mean_D - (text - self.mean_D) @ weights_DxD for text, code in (train, held_out)]
        return left[0], left[1]


def _error(fit: _Fit, train: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]) -> Error:
    mean_D = train[1].mean(axis=0)
    residuals = fit.residuals(train, held_out)
    shares = [
        float(np.square(left).sum() / max(np.square(code - mean_D).sum(), 1e-300))
        for left, (_, code) in zip(residuals, (train, held_out), strict=True)
    ]
    return Error(*shares)


def _gaussian(code_NxD: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows with the mean and covariance of the given ones, [count, D]; from a factor, so that no rank is too low."""
    rng = np.random.default_rng(seed)
    mean_D = code_NxD.mean(axis=0)
    draws_PxN = rng.standard_normal((count, len(code_NxD)))
    return mean_D + draws_PxN @ (code_NxD - mean_D) / np.sqrt(max(1, len(code_NxD) - 1))
