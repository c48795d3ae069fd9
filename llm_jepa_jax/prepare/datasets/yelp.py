# SPDX-License-Identifier: Apache-2.0
"""Yelp reviews with two classes or five, as Zhang et al. (2015) published them."""

import re

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.dataset import DataSet, Layout, Line, Original, Rows, conversation
from llm_jepa_jax.prepare.rows import separated
from llm_jepa_jax.prepare.source_files import SourceFile

POLARITY = "Determine whether the review is positive or negative"
STARS = "Determine how many stars, from 1 to 5, the review gives"
LABELS = {POLARITY: {"1": "Bad", "2": "Good"}, STARS: {str(n): f"{n} star{'s' * (n > 1)}" for n in range(1, 6)}}
URL = "https://s3.amazonaws.com/fast-ai-nlp/"


def rows(file: SourceFile) -> Rows:
    """(system turn, class, review): the directory or the archive says which of the two sets it is.

    Raises:
        UserError: it does not.
    """
    said = re.findall("polarity|full", file.origin)
    if not said:
        raise UserError(
            f"{file.origin}: two classes or five? Its path must say `polarity` or `full`, such as yelp_review_full_csv/"
        )
    for where, fields in separated(file):
        yield where, (POLARITY if said[-1] == "polarity" else STARS, fields)


def record(row: tuple[str, list[str]], where: str) -> Line:
    system, fields = row
    if len(fields) != 2 or fields[0] not in LABELS[system]:
        raise UserError(f'{where}: a row is "CLASS","REVIEW" with a class of {", ".join(LABELS[system])}')
    review = fields[1].replace("\\n", "\n").replace('\\"', '"')  # the files escape both
    return conversation(system, review.strip(), LABELS[system][fields[0]])


DATASET = DataSet(
    "yelp",
    licence="Yelp Dataset Agreement (academic use)",
    homepage="https://www.yelp.com/dataset",
    layouts=(Layout({"train": ("train.csv",), "test": ("test.csv",)}, rows, record),),
    originals=(
        Original(
            URL + "yelp_review_polarity_csv.tgz", "528f22e286cad085948acbc3bea7e58188416546b0e364d0ae4ca0ce666abe35"
        ),
        Original(
            URL + "yelp_review_full_csv.tgz",
            "56006b0a17a370f1e366504b1f2c3e3754e4a3dda17d3e718a885c552869a559",
            default=False,
        ),
    ),
)
