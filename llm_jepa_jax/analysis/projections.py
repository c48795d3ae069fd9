# SPDX-License-Identifier: Apache-2.0
"""Both views in the plane, neighbours kept near each other: t-SNE, and UMAP where it is installed."""

import importlib.util
from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from llm_jepa_jax.errors import UserError

Places = tuple[np.ndarray, np.ndarray]
"""Of the text and the code view, [P, 2] each."""


def tsne_places(text_PxD: np.ndarray, code_PxD: np.ndarray) -> Places:
    """t-SNE by cosine (van der Maaten & Hinton, 2008), the same places every time."""
    both = np.concatenate([text_PxD, code_PxD])
    perplexity = min(30.0, (len(both) - 1) / 3)
    return _fitted(
        TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0), both, len(text_PxD)
    )  # fmt: skip


def umap_places(text_PxD: np.ndarray, code_PxD: np.ndarray) -> Places:
    """UMAP by cosine (McInnes et al., 2018), the same places every time."""
    import umap  # half a minute of compiling, wanted only where asked for

    both = np.concatenate([text_PxD, code_PxD])
    neighbours = min(15, len(both) - 1)
    return _fitted(umap.UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1), both, len(text_PxD))


def check_umap() -> None:
    """Before any work.

    Raises:
        UserError: `umap-learn` is not installed.
    """
    if importlib.util.find_spec("umap") is None:
        raise UserError(
            '--umap: needs umap-learn, which is not installed; `pip install -e ".[analysis]"`, or leave the '
            "flag out: PCA and t-SNE are always drawn"
        )


def _fitted(method: Any, both: np.ndarray, num_texts: int) -> Places:
    # Threads add in an order of their own, and on a busy machine wait for each other in every one of a thousand steps.
    with threadpool_limits(1, user_api="openmp"):
        places = method.fit_transform(both)
    return places[:num_texts], places[num_texts:]
