# SPDX-License-Identifier: Apache-2.0
"""Perplexity of records: exp of the mean of −log p over their targets' tokens, those of next-token training."""

from llm_jepa_jax.eval.task import LikelihoodTask

TASKS = (
    LikelihoodTask("perplexity", "of the answers' tokens, and of plain text", targets="assistant"),
    LikelihoodTask("perplexity_all", "of all tokens, prompts and template included", targets="all"),
)
