# SPDX-License-Identifier: Apache-2.0
"""Is the representation collapsing? Host-side measures of embeddings, numpy only."""

import numpy as np


def effective_rank(embeddings_NxD: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of the centred matrix (Roy & Vetterli, 2007).

    1 when all rows lie on a line, min(N - 1, D) when they spread evenly; 0 when they are all equal.
    """
    centred_NxD = np.asarray(embeddings_NxD, np.float64)
    centred_NxD = centred_NxD - centred_NxD.mean(axis=0)
    singular = np.linalg.svd(centred_NxD, compute_uv=False)
    if singular.sum() <= 1e-12:
        return 0.0
    share = singular / singular.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def pair_cosines(a_NxD: np.ndarray, b_NxD: np.ndarray) -> np.ndarray:
    """Cosine similarity of row i of `a` with row i of `b`, [N]."""
    norms_N = np.linalg.norm(a_NxD, axis=1) * np.linalg.norm(b_NxD, axis=1)
    return (a_NxD * b_NxD).sum(axis=1) / np.maximum(norms_N, 1e-8)


def shuffled_cosines(text_NxD: np.ndarray, code_NxD: np.ndarray) -> np.ndarray:
    """Cosines of every text with the next pair's code, [N]: what pairs get by chance."""
    return pair_cosines(text_NxD, np.roll(code_NxD, 1, axis=0))


def collapse_warnings(metrics: dict[str, float], rank_floor: float, std_floor: float, cos_ceiling: float) -> list[str]:
    """In words, which measures of the views say that they collapse. A floor of 0 and a ceiling of 1 never warn."""
    shuffled = metrics.get("cos_shuffled", 0.0)
    alike = [f"cos_shuffled={shuffled:.4g} is over `log.cos_ceiling`={cos_ceiling:g}: all views point one way"]
    return (alike if shuffled > cos_ceiling and cos_ceiling < 1 else []) + [
        f"{name}={metrics[name]:.3g} is under `{key}`={floor:g}: the {name[-4:]} view's embeddings collapse"
        for measure, key, floor in (("rank", "log.rank_floor", rank_floor), ("std", "log.std_floor", std_floor))
        for name in (f"{measure}_text", f"{measure}_code")
        if metrics.get(name, floor) < floor
    ]


def collapse_metrics(text_NxD: np.ndarray, code_NxD: np.ndarray) -> dict[str, float]:
    """The always-logged measures of N pairs; none for fewer than 2 pairs, or where embeddings are not finite."""
    if len(text_NxD) < 2 or not (np.isfinite(text_NxD).all() and np.isfinite(code_NxD).all()):
        return {}
    return {
        "cos_shuffled": float(shuffled_cosines(text_NxD, code_NxD).mean()),
        "rank_text": effective_rank(text_NxD),
        "rank_code": effective_rank(code_NxD),
        "std_text": float(text_NxD.std(axis=0).mean()),
        "std_code": float(code_NxD.std(axis=0).mean()),
    }
