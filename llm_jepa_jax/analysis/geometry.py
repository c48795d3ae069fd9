# SPDX-License-Identifier: Apache-2.0
"""How the embeddings of two views lie: pure functions of arrays, numpy alone, in float64.

Row i of `text_PxD` and row i of `code_PxD` are the two views of pair i. Effective rank is in
`objectives/diagnostics.py`, where training logs it.
"""

from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import pdist

from llm_jepa_jax.objectives.diagnostics import pair_cosines

SPECTRUM = 100
"""Singular values that the papers show."""


def singular_values(text_PxD: np.ndarray, code_PxD: np.ndarray) -> np.ndarray:
    """Of the matrix Enc(Text) − Enc(Code), largest first, [min(P, D)] (LLM-JEPA, arXiv 2509.14252, section 4.2)."""
    difference_PxD = np.asarray(text_PxD, np.float64) - np.asarray(code_PxD, np.float64)
    return np.linalg.svd(difference_PxD, compute_uv=False)


def rms_norm(embeddings_PxD: np.ndarray) -> float:
    """Root mean square of the rows' lengths: what makes spectra of differently long embeddings comparable."""
    return float(np.sqrt(np.square(embeddings_PxD, dtype=np.float64).sum(axis=1).mean()))


def unit_rows(embeddings_PxD: np.ndarray) -> np.ndarray:
    """Every row divided by its length, float64; rows of zeros stay."""
    rows_PxD = np.asarray(embeddings_PxD, np.float64)
    return rows_PxD / np.maximum(np.linalg.norm(rows_PxD, axis=1, keepdims=True), 1e-12)


def alignment(text_PxD: np.ndarray, code_PxD: np.ndarray) -> float:
    """Mean squared distance of a pair on the unit sphere, 0 to 4; lower is closer (Wang & Isola, 2020, α = 2)."""
    return float(np.square(unit_rows(text_PxD) - unit_rows(code_PxD)).sum(axis=1).mean())


def uniformity(embeddings_PxD: np.ndarray) -> float:
    """log of the mean of exp(−2 ‖x − y‖²) over all pairs of rows on the unit sphere (Wang & Isola, 2020, t = 2).

    0 where all rows point one way; the more evenly they spread, the lower. Of P rows, at least 2.
    """
    return float(np.log(np.exp(-2.0 * pdist(unit_rows(embeddings_PxD), "sqeuclidean")).mean()))


def mismatched(num_pairs: int, seed: int) -> np.ndarray:
    """int64 [P]: a permutation in which nothing keeps its place, a random cycle. Of at least 2."""
    order_P = np.random.default_rng(seed).permutation(num_pairs)
    partners_P = np.empty(num_pairs, np.int64)
    partners_P[order_P] = np.roll(order_P, 1)
    return partners_P


class Cosines(NamedTuple):
    """Of every pair, and of every text with another pair's code."""

    pairs_P: np.ndarray
    shuffled_P: np.ndarray

    @property
    def gap(self) -> float:
        """Difference of the means in pooled standard deviations (Cohen's d); NaN where nothing scatters."""
        spread = np.sqrt((self.pairs_P.var() + self.shuffled_P.var()) / 2)
        return float((self.pairs_P.mean() - self.shuffled_P.mean()) / spread) if spread > 1e-12 else float("nan")


def cosines(text_PxD: np.ndarray, code_PxD: np.ndarray, seed: int) -> Cosines:
    """Cosine of each pair, and of each text with the code of a pair drawn for it."""
    text_PxD, code_PxD = np.asarray(text_PxD, np.float64), np.asarray(code_PxD, np.float64)
    others_P = mismatched(len(text_PxD), seed)
    return Cosines(pair_cosines(text_PxD, code_PxD), pair_cosines(text_PxD, code_PxD[others_P]))


class Plane(NamedTuple):
    """Both views in two dimensions."""

    text_Px2: np.ndarray
    code_Px2: np.ndarray
    explained: tuple[float, float]
    """The share of the variance that each axis shows."""


def principal_plane(text_PxD: np.ndarray, code_PxD: np.ndarray) -> Plane:
    """The plane of the greatest variance of both views' unit rows together (Pearson, 1901): PCA by SVD.

    Each axis has the sign that makes its largest component positive, so that a picture is the same every time.
    """
    both_MxD = np.concatenate([unit_rows(text_PxD), unit_rows(code_PxD)])
    both_MxD -= both_MxD.mean(axis=0)
    _, singular, axes_KxD = np.linalg.svd(both_MxD, full_matrices=False)
    axes_2xD = axes_KxD[:2]
    axes_2xD = axes_2xD * np.sign(axes_2xD[np.arange(2), np.abs(axes_2xD).argmax(axis=1)])[:, None]
    places_Mx2 = both_MxD @ axes_2xD.T
    total = np.square(singular).sum()
    first, second = (np.square(singular[:2]) / total if total > 0 else np.zeros(2)).tolist()
    return Plane(places_Mx2[: len(text_PxD)], places_Mx2[len(text_PxD) :], (first, second))
