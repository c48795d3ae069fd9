# SPDX-License-Identifier: Apache-2.0
"""Rotten Tomatoes: the answer begins with the label, `Good` or `Bad` (Pang & Lee, 2005)."""

from llm_jepa_jax.eval.labels import label_session
from llm_jepa_jax.eval.task import AnswerTask

TASKS = (AnswerTask("rotten_tomatoes", "share of answers that begin with the right label", open=label_session),)
