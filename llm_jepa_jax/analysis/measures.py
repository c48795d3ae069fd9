# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured of one model's embeddings of the same pairs."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from llm_jepa_jax.analysis.geometry import (
    SPECTRUM,
    Cosines,
    alignment,
    cosines,
    rms_norm,
    singular_values,
    uniformity,
)
from llm_jepa_jax.analysis.linear_map import LinearMap, halves, linear_map
from llm_jepa_jax.analysis.retrieval import chance, recall
from llm_jepa_jax.objectives.diagnostics import effective_rank

KS = (1, 10)
"""Of recall@k."""
SEED = 0
"""Of shuffled and permuted pairs and of Gaussian codes: the same for every model."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The views that all models encode."""

    locations: tuple[str, ...]
    """`file:line` of the record that each comes from."""
    texts: tuple[str, ...]
    codes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, kept_P: np.ndarray) -> "Pairs":
        """Those at which `kept_P` is true."""
        parts = (
            [value for value, kept in zip(part, kept_P, strict=True) if kept] for part in dataclasses.astuple(self)
        )
        return Pairs(*(tuple(part) for part in parts))

    def summary(self) -> dict[str, Any]:
        different = {"different_texts": len(set(self.texts)), "different_codes": len(set(self.codes))}
        return {"pairs": len(self), "records": len(set(self.locations))} | different

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs to fit the linear map on and pairs to try it on; no record and no text is in both."""
        return halves(self.locations, self.texts)

    def chance(self) -> dict[str, dict[int, float]]:
        """recall@k of a random order, both ways."""
        both = {"text_to_code": (self.texts, self.codes), "code_to_text": (self.codes, self.texts)}
        return {way: chance(*contents, KS) for way, contents in both.items()}


class Embeddings(NamedTuple):
    """Of one model in one reading, float32 [P, D]."""

    text_PxD: np.ndarray
    code_PxD: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model in one reading."""

    spectrum: np.ndarray
    """Singular values of Enc(Text) − Enc(Code)."""
    length_text: float
    length_code: float
    """Root mean square of the embeddings' lengths."""
    rank_text: float
    rank_code: float
    rank_difference: float
    """Effective ranks, of the centred matrices."""
    cosines: Cosines
    alignment: float
    uniformity_text: float
    uniformity_code: float
    text_to_code: dict[int, float]
    code_to_text: dict[int, float]
    """recall@k."""
    map: LinearMap

    @property
    def relative_spectrum(self) -> np.ndarray:
        """Singular values over √P times the length of a code's embedding: 1 would be a difference as long as it."""
        return self.spectrum / max(self.length_code * np.sqrt(len(self.cosines.pairs_P)), 1e-300)

    def summary(self) -> dict[str, Any]:
        """Every number, as JSON."""
        fitted = self.map
        return {
            "singular_values": self.spectrum[:SPECTRUM].tolist(),
            "relative_singular_values": self.relative_spectrum[:SPECTRUM].tolist(),
            "length": {"text": self.length_text, "code": self.length_code},
            "effective_rank": {
                "text": self.rank_text, "code": self.rank_code, "difference": self.rank_difference,
                "most": min(len(self.cosines.pairs_P) - 1, fitted.width),
            },
            "cosine": {
                "pairs": _spread(self.cosines.pairs_P), "shuffled": _spread(self.cosines.shuffled_P),
                "gap": None if np.isnan(self.cosines.gap) else self.cosines.gap,
            },
            "alignment": self.alignment,
            "uniformity": {"text": self.uniformity_text, "code": self.uniformity_code},
            "recall": {"text_to_code": _named(self.text_to_code), "code_to_text": _named(self.code_to_text)},
            "linear_map": {
                **{name: getattr(fitted, name)._asdict() for name in ("pairs", "permuted", "gaussian", "rms")},
                "rank": fitted.rank, "train_pairs": fitted.num_train, "held_out_pairs": fitted.num_held_out,
                "width": fitted.width, "too_few_pairs": fitted.too_few,
            },
        }  # fmt: skip


def measure(embedded: Embeddings, pairs: Pairs, split: tuple[np.ndarray, np.ndarray]) -> Measured:
    """All measures of one model's embeddings of `pairs`, in their order."""
    text_PxD, code_PxD = (np.asarray(view, np.float64) for view in embedded)
    return Measured(
        spectrum=singular_values(text_PxD, code_PxD),
        length_text=rms_norm(text_PxD),
        length_code=rms_norm(code_PxD),
        rank_text=effective_rank(text_PxD),
        rank_code=effective_rank(code_PxD),
        rank_difference=effective_rank(text_PxD - code_PxD),
        cosines=cosines(text_PxD, code_PxD, SEED),
        alignment=alignment(text_PxD, code_PxD),
        uniformity_text=uniformity(text_PxD),
        uniformity_code=uniformity(code_PxD),
        text_to_code=recall(text_PxD, code_PxD, pairs.texts, pairs.codes, KS),
        code_to_text=recall(code_PxD, text_PxD, pairs.codes, pairs.texts, KS),
        map=linear_map(text_PxD, code_PxD, *split, SEED),
    )


def _spread(values_P: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values_P, [5, 50, 95]).tolist()
    return {"mean": float(values_P.mean()), "std": float(values_P.std()), "p5": low, "p50": middle, "p95": high}


def _named(recalls: dict[int, float]) -> dict[str, float]:
    return {f"recall@{k}": value for k, value in recalls.items()}
