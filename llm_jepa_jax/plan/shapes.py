# SPDX-License-Identifier: Apache-2.0
"""The shapes of a training step without its data: from the configuration, and a few assumptions that are said aloud."""

import dataclasses
import math

from llm_jepa_jax.batch import RowShape
from llm_jepa_jax.config import Config
from llm_jepa_jax.data.kinds import SLOT_MARGINS
from llm_jepa_jax.data.views import branch_size
from llm_jepa_jax.errors import UserError

LANES = 128
"""Assumed lengths are multiples of this."""


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What the data would say."""

    examples_per_row: float = 8.0
    """Conversations in a row, on average."""
    longest_segment: int = 0
    """Tokens of the longest conversation or view; 0: twice the average conversation."""
    epoch_tokens: float = 1e9
    """Tokens of the training set."""


def step_shape(config: Config, assumed: Assumptions) -> RowShape:
    """The row of a step with pairs, slots as the data pipeline would size them.

    Raises:
        UserError: an assumption contradicts the configuration.
    """
    data, objective = config.data, config.objective
    if assumed.examples_per_row <= 0:
        raise UserError(f"--examples_per_row={assumed.examples_per_row}: a row holds something; use a number above 0")
    if assumed.longest_segment > data.row_length:
        raise UserError(
            f"--longest_segment={assumed.longest_segment}: longer than `data.row_length`={data.row_length}; use less"
        )
    margin = SLOT_MARGINS[0]
    average = data.row_length / assumed.examples_per_row
    longest = assumed.longest_segment or min(data.row_length, -(-math.ceil(2 * average) // LANES) * LANES)
    share = 1.0 - objective.jepa.dropout if objective.jepa.dropout_by == "example" else 1.0
    pairs = math.ceil(assumed.examples_per_row * share * margin) if objective.jepa.weight else 0
    # Of a row's tokens, `all` makes targets of conversations; assistant turns are about half of those.
    targets = data.row_length if objective.ntp.targets == "all" else data.row_length // 2
    stp = objective.stp
    spans = math.ceil(assumed.examples_per_row * stp.draws * margin) if stp.weight and stp.mode != "curvature" else 0
    return RowShape(
        data.row_length,
        data.target_slots or targets,
        data.pair_slots or pairs,
        longest,
        branch_size(config) if pairs else 0,
        span_slots=spans,
    )


def describe(config: Config, shape: RowShape, assumed: Assumptions) -> list[str]:
    """The assumptions in words."""
    longest = "as long as a row" if shape.longest_segment == shape.length else f"up to {shape.longest_segment} tokens"
    lines = [
        f"{config.data.rows_per_step} rows of {shape.length} tokens a step, all of them used",
        f"{assumed.examples_per_row:g} examples a row (--examples_per_row), segments {longest} (--longest_segment)",
        f"{shape.target_slots} target slots and {shape.pair_slots} pair slots a row, "
        f"{shape.width - shape.length} tokens of branches behind it",
    ]
    if config.objective.jepa.dropout_by == "step" and config.objective.jepa.dropout and shape.pair_slots:
        lines.append("the step with pairs; steps without (objective.jepa.dropout_by=step) are shorter")
    return lines
