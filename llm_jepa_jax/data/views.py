# SPDX-License-Identifier: Apache-2.0
"""What one example costs in a row, and which examples have their JEPA pair in an epoch."""

import dataclasses

import numpy as np

from llm_jepa_jax.config import Config
from llm_jepa_jax.data.corpus import TokenizedCorpus

_PAIR_STREAM, _COPY_STREAM = 1, 2


def uniform(seed: int, epoch: int, stream: int, index_N: np.ndarray) -> np.ndarray:
    """float64 [N] in [0, 1), each from (seed, epoch, stream, index) alone (SplitMix64; Steele et al., 2014).

    Counter-based, so a draw depends on no order, no host and no restart.
    """
    with np.errstate(over="ignore"):
        state_N = np.asarray(index_N, np.uint64)
        for word in (seed, epoch, stream):
            state_N = _mix(state_N + np.uint64((word * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF))
    return (state_N >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


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

    def tokens(self, pair_N: np.ndarray) -> np.ndarray:
        """int64 [N] tokens of each example, given which have their pair."""
        return self.conversation_N + self.views_N * pair_N


def branch_size(config: Config) -> int:
    """Predictor tokens of a pair that lie on a branch behind the row; 0 where they lie in the row, with their view."""
    jepa = config.objective.jepa
    on_branch = config.data.layout == "shared" and jepa.source == "text" and jepa.weight
    return jepa.num_predictors if on_branch else 0


def example_costs(corpus: TokenizedCorpus, config: Config) -> Costs:
    """Exact costs of every record under the layout and the objective."""
    jepa = config.objective.jepa
    lengths = {view: corpus.lengths(f"{view}_view") for view in ("text", "code")}
    lengths[jepa.source] = lengths[jepa.source] + jepa.num_predictors
    if not jepa.weight:
        lengths = {view: np.zeros_like(length_N) for view, length_N in lengths.items()}
    if config.data.layout == "shared":
        lengths["text"] = np.zeros_like(lengths["text"])
    conversation_N = corpus.lengths("conversation")
    longest_N = np.maximum(conversation_N, np.maximum(lengths["text"], lengths["code"]))
    targets_N = corpus.num_targets(config.objective.ntp.targets)
    return Costs(conversation_N, lengths["text"] + lengths["code"], targets_N, longest_N)
