# SPDX-License-Identifier: Apache-2.0
"""The keys of the objectives: the section `objective` of the schema in `config.py`."""

import dataclasses

from llm_jepa_jax.schema import key, section

NUM_RESERVED_PREDICTORS = 10
"""Predictor-token ids that every tokenizer reserves: the largest `objective.jepa.num_predictors`."""
DISTANCES = ("cosine", "l2", "mse", "infonce")


@dataclasses.dataclass(frozen=True)
class TermConfig:
    """What every objective has."""

    weight: float = key(0.0, "factor in the total; 0: off")
    schedule: str = key(
        "constant",
        "`constant`; `linear`: the factor rises from `min_weight` at the first step to `weight` at the last of "
        "`schedule_steps`",
        choices=("constant", "linear"),
    )
    min_weight: float = key(0.0, "factor at the first step, with `schedule`=linear")
    schedule_steps: int = key(0, "steps of the rise; 0: the whole run", "steps")


@dataclasses.dataclass(frozen=True)
class NtpConfig(TermConfig):
    weight: float = key(1.0, "γ: weight of the next-token loss; 0: off")
    targets: str = key(
        "assistant",
        "`assistant`: tokens of assistant turns with their end token, and of plain text; `all`: every token",
        choices=("assistant", "all"),
    )
    z_loss: float = key(
        0.0,
        "weight of the squared log-partition of each target, a part of the next-token loss; keeps logits small; 0: off",
    )


@dataclasses.dataclass(frozen=True)
class VectorsConfig(TermConfig):
    """What an objective has that brings two vectors together."""

    distance: str = key(
        "cosine",
        "`cosine`: 1 − cos; `l2`: length of the difference; `mse`: its entries' mean square; `infonce`: cross-entropy "
        "of picking the right one among all of the global batch by cosine",
        choices=DISTANCES,
    )
    temperature: float = key(0.07, "τ: cosines are divided by it, with `distance`=infonce")
    layer: int = key(
        -1, "hidden states compared: 0 the embeddings, i what block i gives, -1 the last block's, -2 the one before …"
    )
    final_norm: bool = key(
        True, "the model's final norm is applied to them (published: yes for the last layer, no for the others)"
    )
    linear_predictor: bool = key(
        False, "the predicting vector goes through a learned matrix [D, D] first (Xavier uniform at the start)"
    )


@dataclasses.dataclass(frozen=True)
class JepaConfig(VectorsConfig):
    weight: float = key(1.0, "λ: weight of the JEPA loss; 0: off, and no view enters a row")
    num_predictors: int = key(
        1, f"k: predictor tokens of the view that predicts, 0 to {NUM_RESERVED_PREDICTORS}", "tokens"
    )
    shared_predictor: bool = key(False, "the k predictor tokens are one token k times, not k different ones")
    direction: str = key(
        "text_to_code",
        "which view predicts the other, and so has the predictor tokens; in the `shared` layout `code_to_text` reads "
        "its target inside the conversation",
        choices=("text_to_code", "code_to_text"),
    )
    placement: str = key(
        "append",
        "predictor tokens come behind the view's content (`append`) or before it (`prepend`: its own end is read)",
        choices=("append", "prepend"),
    )
    view_end: str = key(
        "content",
        "where a view ends: its last `content` or predictor token, or the end-of-`turn` token after it",
        choices=("content", "turn"),
    )
    view_end_offset: int = key(0, "tokens before that end where both views are read", "tokens")
    pooling: str = key(
        "last",
        "a view's embedding: the hidden state at its end (`last`), or the `mean` over the view up to there",
        choices=("last", "mean"),
    )
    stop_gradient: bool = key(
        False, "no gradient into the view that is predicted: the other alone moves (published: both views move)"
    )
    dropout: float = key(
        0.0, "α: share of examples that go without their JEPA pairs, drawn from (seed, epoch, example)"
    )
    dropout_by: str = key(
        "example",
        "`example`: rows mix examples with and without their pairs; `step`: they are packed apart, so that a step has "
        "pairs throughout or runs next-token prediction alone, in a compiled step of its own",
        choices=("example", "step"),
    )

    @property
    def source(self) -> str:
        """The view that predicts: `text` or `code`."""
        return self.direction.split("_")[0]


@dataclasses.dataclass(frozen=True)
class StpConfig(VectorsConfig):
    mode: str = key(
        "random_span",
        "`random_span`: displacement over a span against that over the rest; `e2e`: over the user turn against over "
        "the assistant turn; `mean`: mean state of the one against that of the other; `curvature`: mean angle between "
        "one step and the next; `mask`: the text without a span against the span, each encoded anew; `mask_recover`: "
        "the text without a span against the text",
        choices=("random_span", "e2e", "mean", "curvature", "mask", "mask_recover"),
    )
    draw: str = key(
        "start_then_end",
        "how a span is drawn: its start and then its end behind it; two ends at once (`both`); `uniform` over spans",
        choices=("start_then_end", "both", "uniform"),
    )
    draws: int = key(1, "spans of an example, each with its own term")
    from_start: bool = key(False, "spans begin with the first token")
    max_length: int = key(0, "longest span; 0: any but the whole", "tokens")
    across_turns: bool = key(False, "the tokens between the user's and the assistant's content count too")
    whole_conversation: bool = key(False, "everything before the user's content counts too")
    length_weighting: str = key(
        "none",
        "weight of a span of p tokens with r left: 1; `cosine`: 2pr / (p² + r²); `jaccard`: 1 − abs(r − p) / (r + p)",
        choices=("none", "cosine", "jaccard"),
    )

    @property
    def adds_segments(self) -> bool:
        """Whether the mode encodes texts of its own."""
        return self.mode in ("mask", "mask_recover")


@dataclasses.dataclass(frozen=True)
class SpreadConfig(TermConfig):
    """Marks an objective that looks at the views of all pairs of a step together: it needs JEPA's views, and no
    micro-batches."""


@dataclasses.dataclass(frozen=True)
class VicregConfig(SpreadConfig):
    weight: float = key(0.0, "weight of the spread of both views' embeddings, which keeps JEPA from collapsing; 0: off")
    target_std: float = key(
        0.8, "standard deviation below which a dimension is pushed apart (embeddings of length sqrt(D))"
    )
    covariance: float = key(0.04, "weight of the squared covariances against the standard deviations (published: 1/25)")


@dataclasses.dataclass(frozen=True)
class SigregConfig(SpreadConfig):
    weight: float = key(
        0.0, "weight of the distance of both views' embeddings from the standard normal (LeJEPA's SIGReg); 0: off"
    )
    directions: int = key(256, "random directions that the embeddings are compared along, drawn anew every step")
    knots: int = key(17, "points at which characteristic functions are compared, from 0 to `reach`")
    reach: float = key(3.0, "the last of those points")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    ntp: NtpConfig = section(NtpConfig, "next-token prediction")
    jepa: JepaConfig = section(JepaConfig, "joint-embedding prediction between the two views")
    stp: StpConfig = section(StpConfig, "semantic tube prediction within one sequence")
    vicreg: VicregConfig = section(VicregConfig, "variance and covariance regularisation of the views")
    sigreg: SigregConfig = section(SigregConfig, "sketched isotropic-Gaussian regularisation of the views")
    head_chunk: int = key(256, "targets of one device whose logits exist at one time", "targets")
