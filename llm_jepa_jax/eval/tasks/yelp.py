# SPDX-License-Identifier: Apache-2.0
"""Yelp reviews: the answer begins with the label, whatever labels the records have (Zhang et al., 2015)."""

from llm_jepa_jax.eval.labels import label_session
from llm_jepa_jax.eval.task import AnswerTask

TASKS = (AnswerTask("yelp", "share of answers that begin with the right label", open=label_session),)
