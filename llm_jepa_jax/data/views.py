# SPDX-License-Identifier: Apache-2.0
"""What one example costs in a row, and what is drawn for it in an epoch."""

import dataclasses

import numpy as np

from llm_jepa_jax.config import Config
from llm_jepa_jax.data.corpus import TokenizedCorpus
from llm_jepa_jax.data.draws import uniform
from llm_jepa_jax.data.spans import content_points, masked_tokens

_PAIR_STREAM, _COPY_STREAM = 1, 2


def has_pair(config: Config, epoch: int, examples_N: np.ndarray) -> np.ndarray:
    """bool [N]: which examples keep their JEPA pair this epoch (loss dropout by example, LLM-JEPA section 5)."""
    jepa = config.objective.jepa
    if not jepa.weight:
        return np.zeros(len(examples_N), np.bool_)
    return uniform(config.seed, epoch, _PAIR_STREAM, examples_N) >= jepa.dropout


def copies(config: Config, epoch: int, weights_N: np.ndarray) -> np.ndarray:
    """int64 [N]: how often each record comes this epoch; the fraction of a weight is drawn anew."""
    whole_N = np.floor(weights_N)
    extra_N = uniform(config.seed, epoch, _COPY_STREAM, np.arange(len(weights_N))) < weights_N - whole_N
    return (whole_N + extra_N).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What N examples take of a row: tokens without and with their pair, and target slots. int64 [N] each."""

    conversation_N: np.ndarray
    views_N: np.ndarray
    """Tokens of the row that a pair adds; branches have places of their own."""
    targets_N: np.ndarray
    longest_N: np.ndarray
    """Tokens of the longest segment of each, with its pair."""
    points_Nx4: np.ndarray
    """Where the text lies that spans are taken from (`spans.content_points`)."""
    masked_N: np.ndarray
    """Most tokens that the mask modes of `objective.stp` add."""

    def tokens(self, pair_N: np.ndarray) -> np.ndarray:
        """int64 [N] tokens of each example, given which have their pair; the most they can be in any epoch."""
        return self.conversation_N + self.views_N * pair_N + self.masked_N


def branch_size(config: Config) -> int:
    """Tokens of a pair that lie on a branch behind the row: predictor tokens, and the end-of-turn token behind them; 0
    where they lie in the row, with their view."""
    jepa = config.objective.jepa
    on_branch = config.data.layout == "shared" and jepa.source == "text" and jepa.weight and jepa.num_predictors
    return jepa.num_predictors + (jepa.view_end == "turn") if on_branch else 0


def example_costs(corpus: TokenizedCorpus, config: Config) -> Costs:
    """Exact costs of every record under the layout and the objective."""
    jepa = config.objective.jepa
    lengths = view_lengths(corpus, config)
    if not jepa.weight:
        lengths = {view: np.zeros_like(length_N) for view, length_N in lengths.items()}
    if config.data.layout == "shared":
        lengths["text"] = np.zeros_like(lengths["text"])
    conversation_N = corpus.lengths("conversation")
    longest_N = np.maximum(conversation_N, np.maximum(lengths["text"], lengths["code"]))
    targets_N = corpus.num_targets(config.objective.ntp.targets)
    points_Nx4 = content_points(corpus.contents, config.objective.stp)
    masked_N = masked_tokens(config.objective.stp, points_Nx4)
    return Costs(conversation_N, lengths["text"] + lengths["code"], targets_N, longest_N, points_Nx4, masked_N)


def view_lengths(corpus: TokenizedCorpus, config: Config) -> dict[str, np.ndarray]:
    """int64 [N] tokens of each `text` and `code` view as a segment of its own, with all that belongs to it."""
    jepa = config.objective.jepa
    lengths = {view: corpus.lengths(f"{view}_view") + (jepa.view_end == "turn") for view in ("text", "code")}
    lengths[jepa.source] = lengths[jepa.source] + jepa.num_predictors
    return lengths
