# SPDX-License-Identifier: Apache-2.0
"""What one example costs in a row, and what is drawn for it in an epoch."""

import dataclasses

import numpy as np

from llm_jepa_jax.config import Config
from llm_jepa_jax.data.cuts import Texts, draw_cuts, most_cut
from llm_jepa_jax.data.draws import uniform
from llm_jepa_jax.data.indexed import Corpus
from llm_jepa_jax.data.spans import content_points, draw_spans, masked_tokens
from llm_jepa_jax.objective_config import StpConfig
from llm_jepa_jax.text.chat import DOCUMENT_HEADER

_PAIR_STREAM, _COPY_STREAM = 1, 2
VIEWS = ("text", "code")


def has_pair(config: Config, epoch: int, examples_N: np.ndarray) -> np.ndarray:
    """bool [N]: which examples keep their JEPA pairs this epoch (loss dropout by example, LLM-JEPA section 5)."""
    jepa = config.objective.jepa
    if not jepa.weight:
        return np.zeros(len(examples_N), np.bool_)
    return uniform(config.seed, epoch, _PAIR_STREAM, examples_N) >= jepa.dropout


def copies(config: Config, epoch: int, weights_N: np.ndarray) -> np.ndarray:
    """int64 [N]: how often each record comes this epoch; the fraction of a weight is drawn anew."""
    copies_N = weights_N.astype(np.int64)
    part_M = np.flatnonzero(weights_N != copies_N)
    copies_N[part_M] += uniform(config.seed, epoch, _COPY_STREAM, part_M) < weights_N[part_M] - copies_N[part_M]
    return copies_N


@dataclasses.dataclass(frozen=True)
class Costs:
    """What N examples take of a row. int32 [N] each, unless said: a corpus may have hundreds of millions.

    Two things are drawn for an example in every epoch, both spans of its tokens: the cut that makes two views of plain
    text (`cuts`), and the spans of `objective.stp` (`spans`). Where they add tokens to a row, the row's length is
    chosen by the most they can be, and rows are packed by what they are.
    """

    conversation_N: np.ndarray
    targets_N: np.ndarray
    pairs_N: np.ndarray
    """Pairs of each; 0 where a text is too short to be cut."""
    views_N: np.ndarray
    """Tokens of the row that its pairs add beside what is cut from a text; branches have places of their own."""
    cut_N: np.ndarray
    """Most tokens of the row that are cut from it."""
    masked_N: np.ndarray
    """Most tokens that the mask modes of `objective.stp` add."""
    longest_N: np.ndarray
    """Tokens of the longest segment of each, with its pairs, in any epoch."""
    points_Nx4: np.ndarray
    """Where the text lies that spans are taken from (`spans.content_points`)."""
    laid: tuple[str, ...] = VIEWS
    """The views that are segments of the row; the others are read inside the conversation."""
    stp: StpConfig = StpConfig()
    texts: Texts | None = None
    """Where plain texts can be cut; None: no views are."""
    text_views: str = "continuation"

    @property
    def num_cuts(self) -> int:
        """The first of what is drawn: spans of plain text's views, 2 or 0."""
        return 2 if self.texts is not None else 0

    @property
    def num_spans(self) -> int:
        """The rest of what is drawn: spans of `objective.stp`."""
        return (self.stp.draws if self.stp.mode == "random_span" else 1) if self.stp.weight else 0

    def draw(self, seed: int, epoch: int, ids_N: np.ndarray) -> np.ndarray:
        """int32 [N, K, 2]: what is drawn for these examples this epoch, K = `num_cuts` + `num_spans`."""
        drawn = [np.zeros((len(ids_N), 0, 2), np.int32)]
        if self.texts is not None:
            drawn.append(draw_cuts(self.text_views, seed, epoch, self.texts, ids_N))
        if self.stp.weight:
            drawn.append(draw_spans(self.stp, seed, epoch, self.points_Nx4[ids_N], ids_N))
        return np.concatenate(drawn, axis=1)

    def tokens(
        self, pairs_N: np.ndarray, drawn_NxKx2: np.ndarray | None = None, examples: np.ndarray | None = None
    ) -> np.ndarray:
        """int [N] tokens of each example, given how many pairs it has (all of its own, or none) and what is drawn;
        the most they can be in any epoch without `drawn`. `examples` are ids where it is not about all in order."""
        of = slice(None) if examples is None else examples
        cut_N, masked_N = self.cut_N[of], self.masked_N[of]
        if drawn_NxKx2 is not None:
            size_NxK = (drawn_NxKx2[..., 1] - drawn_NxKx2[..., 0]).astype(np.int64)
            laid = [VIEWS.index(view) for view in self.laid if self.texts is not None]
            cut_N = size_NxK[:, laid].sum(axis=1)
            masked_N = masked_tokens(self.stp, self.points_Nx4[of], drawn_NxKx2[:, self.num_cuts :])
        return self.conversation_N[of] + np.where(pairs_N > 0, self.views_N[of] + cut_N, 0) + masked_N


def branch_size(config: Config) -> int:
    """Tokens of a pair that lie on a branch behind the row: predictor tokens, and the end-of-turn token behind them; 0
    where they lie in the row, with their view."""
    jepa = config.objective.jepa
    on_branch = config.data.layout == "shared" and jepa.source == "text" and jepa.weight and jepa.num_predictors
    return jepa.num_predictors + (jepa.view_end == "turn") if on_branch else 0


def example_costs(corpus: Corpus, config: Config) -> Costs:
    """Exact costs of every record under the layout and the objective."""
    stp, jepa, how = config.objective.stp, config.objective.jepa, config.data.text_views
    laid = (VIEWS if config.data.layout != "shared" else VIEWS[1:]) if jepa.weight else ()
    texts = corpus.texts if jepa.weight and len(corpus.texts.bounds) else None
    conversation_N, record_Q = corpus.lengths("conversation").astype(np.int32), records_of_pairs(corpus)
    pairs_N, cut_N, views_N = (np.zeros_like(conversation_N) for _ in range(3))
    longest_N = conversation_N.copy()
    if jepa.weight:
        pairs_N += np.diff(corpus.pair_offsets)
    for view in laid:
        length_Q = (corpus.lengths(f"{view}_view") + added_tokens(config)[view]).astype(np.int32)
        np.add.at(views_N, record_Q, length_Q)
        np.maximum.at(longest_N, record_Q, length_Q)
    if texts is not None:
        can_N, most_Nx3 = texts.can_be_cut(how), most_cut(how, texts)
        pairs_N += can_N
        cut_N += most_Nx3[:, 2 if len(laid) == 2 else 1]
        for view in laid:
            around_N = can_N * (DOCUMENT_HEADER + added_tokens(config)[view])
            views_N += around_N
            longest_N = np.maximum(longest_N, (around_N + most_Nx3[:, VIEWS.index(view)]).astype(np.int32))
    targets_N = corpus.num_targets(config.objective.ntp.targets).astype(np.int32)
    points_Nx4 = content_points(corpus.contents, stp)
    masked_N = masked_tokens(stp, points_Nx4).astype(np.int32)
    return Costs(
        conversation_N, targets_N, pairs_N, views_N, cut_N, masked_N, longest_N, points_Nx4, laid, stp, texts, how
    )


def records_of_pairs(corpus: Corpus) -> np.ndarray:
    """int64 [Q]: the record that each pair of a conversation belongs to."""
    return np.repeat(np.arange(len(corpus)), np.diff(corpus.pair_offsets))


def added_tokens(config: Config) -> dict[str, int]:
    """Tokens that a `text` or a `code` view as a segment of its own has beside its header and content."""
    jepa = config.objective.jepa
    return {view: (jepa.view_end == "turn") + jepa.num_predictors * (view == jepa.source) for view in VIEWS}


def shortest_views(corpus: Corpus, config: Config) -> dict[str, np.ndarray]:
    """int32 [N] tokens of the shortest `text` and `code` view that each record can have, as a segment of its own."""
    texts, how, lengths = corpus.texts, config.data.text_views, {}
    for view in VIEWS:
        length_Q = (corpus.lengths(f"{view}_view") + added_tokens(config)[view]).astype(np.int32)
        lengths[view] = np.full(len(corpus), np.iinfo(np.int32).max, np.int32)
        np.minimum.at(lengths[view], records_of_pairs(corpus), length_Q)
        lengths[view][texts.can_be_cut(how)] = DOCUMENT_HEADER + 1 + added_tokens(config)[view]
    return lengths
