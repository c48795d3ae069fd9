# SPDX-License-Identifier: Apache-2.0
"""Does a text find its code among all codes by cosine, and a code its text?"""

from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln

from llm_jepa_jax.analysis.geometry import unit_rows

TIE = 1e-12
"""Cosines closer than this are equal: the rounding of float64."""
CHUNK = 512
"""Queries whose similarities are held at a time."""


def recall(
    query_PxD: np.ndarray, target_PxD: np.ndarray, queries: Sequence[str], targets: Sequence[str], ks: Sequence[int]
) -> dict[int, float]:
    """recall@k of each query's targets among all different ones by cosine, 0 to 1.

    Row i of `query_PxD` embeds the content `queries[i]`, whose target is `targets[i]`. Equal contents are one
    candidate, and any target that a query's content has in some pair is right: a code that two texts share is right
    for both. Where candidates tie, the recall is that expected of a random order among them, so embeddings that have
    collapsed to a point get what chance gets.
    """
    names = {name: index for index, name in enumerate(dict.fromkeys(targets))}
    target_P = np.array([names[name] for name in targets])
    first_C = np.unique(target_P, return_index=True)[1]
    candidates_CxD = unit_rows(target_PxD[first_C])
    query_ids = {name: index for index, name in enumerate(dict.fromkeys(queries))}
    query_P = np.array([query_ids[name] for name in queries])
    right_QxC = np.zeros((len(query_ids), len(names)), np.bool_)
    right_QxC[query_P, target_P] = True
    hits = {k: 0.0 for k in ks}
    for start in range(0, len(query_P), CHUNK):
        chosen = slice(start, start + CHUNK)
        similarity_BxC = unit_rows(query_PxD[chosen]) @ candidates_CxD.T
        right_BxC = right_QxC[query_P[chosen]]
        best_Bx1 = np.where(right_BxC, similarity_BxC, -np.inf).max(axis=1, keepdims=True)
        above_B = (similarity_BxC > best_Bx1 + TIE).sum(axis=1)
        tied_BxC = np.abs(similarity_BxC - best_Bx1) <= TIE
        tied_B, tied_right_B = tied_BxC.sum(axis=1), (tied_BxC & right_BxC).sum(axis=1)
        for k in ks:
            hits[k] += float(_found(k - above_B, tied_B, tied_right_B).sum())
    return {k: hits[k] / len(query_P) for k in ks}


def chance(queries: Sequence[str], targets: Sequence[str], ks: Sequence[int]) -> dict[int, float]:
    """The same recall of a random order of all candidates."""
    partners: dict[str, set[str]] = {}
    for query, target in zip(queries, targets, strict=True):
        partners.setdefault(query, set()).add(target)
    right_P = np.array([len(partners[query]) for query in queries])
    every_P = np.full(len(right_P), len(set(targets)))
    return {k: float(_found(np.full(len(right_P), k), every_P, right_P).mean()) for k in ks}


def _found(places_B: np.ndarray, tied_B: np.ndarray, right_B: np.ndarray) -> np.ndarray:
    """How probable it is that one of `right` is among the first `places` of `tied` in a random order."""
    places_B = np.clip(places_B, 0, tied_B)
    wrong_B = tied_B - right_B
    missed_B = _log_choose(wrong_B, places_B) - _log_choose(tied_B, places_B)
    return np.where(places_B > wrong_B, 1.0, 1.0 - np.exp(np.minimum(missed_B, 0.0)))


def _log_choose(n_B: np.ndarray, k_B: np.ndarray) -> np.ndarray:
    """log of n over k; what has no meaning (k > n) is left to the caller."""
    return gammaln(n_B + 1.0) - gammaln(k_B + 1.0) - gammaln(np.maximum(n_B - k_B, 0) + 1.0)
