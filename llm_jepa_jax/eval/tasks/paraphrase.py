# SPDX-License-Identifier: Apache-2.0
"""Paraphrase: how many words the answer shares with the target, unless it only repeats the sentence given.

The F1 score of words as in SQuAD (Rajpurkar et al., 2016), each counted as often as it comes. Without the second rule,
which is the concern of iBLEU (Sun & Zhou, 2012), a model that copies would score well.
"""

import collections
import contextlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

from llm_jepa_jax.config import EvalConfig
from llm_jepa_jax.data.records import Record
from llm_jepa_jax.eval.task import AnswerTask, Judge, Verdict, partly, the_answer, unparsed, wrong


def words(text: str) -> list[str]:
    """Runs of letters and digits (an apostrophe inside is one of them), case folded."""
    return re.findall(r"\w+(?:['’]\w+)*", unicodedata.normalize("NFKC", text).casefold())


def judge_paraphrase(answer: str, target: str, given: str) -> Verdict:
    """F1 of the words of an answer to the sentence `given`."""
    found, wanted = words(answer), words(target)
    if not found:
        return unparsed("the answer has no words")
    if found == words(given) != wanted:
        return wrong("repeats the sentence given")
    shared = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return partly(2 * shared / (len(found) + len(wanted)), f"{shared} of {len(wanted)} words")


@contextlib.contextmanager
def session(config: EvalConfig, records: Sequence[Record]) -> Iterator[Judge]:
    yield lambda record, answer: judge_paraphrase(answer, the_answer(record), record.messages[-2].content)


TASKS = (AnswerTask("paraphrase", "mean F1 of the words shared with the target; a copy counts 0", open=session),)
