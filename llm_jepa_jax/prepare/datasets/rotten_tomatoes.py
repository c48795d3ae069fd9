# SPDX-License-Identifier: Apache-2.0
"""Rotten Tomatoes: sentences of film reviews, for or against (Pang & Lee, 2005)."""

from llm_jepa_jax.prepare.dataset import DataSet, Layout, Line, Original, Rows, conversation
from llm_jepa_jax.prepare.source_files import SourceFile

SYSTEM = "Determine whether the comment is positive or negative"


def rows(positive: SourceFile, negative: SourceFile) -> Rows:
    """(split, label, sentence), the split by the place in the file: the practice since Li et al. (2019)."""
    for file, label in ((positive, "Good"), (negative, "Bad")):
        lines = [(where, line.strip()) for where, line in file.lines("latin-1")]
        ends = int(len(lines) * 0.8 + 0.5), int(len(lines) * 0.9 + 0.5)
        for place, (where, line) in enumerate(lines):
            yield where, (("train", "dev", "test")[sum(place >= end for end in ends)], label, line)


def record(row: tuple[str, str, str], where: str) -> Line:
    return conversation(SYSTEM, row[2], row[1])


DATASET = DataSet(
    "rotten_tomatoes",
    licence="none stated; the authors ask to be cited",
    homepage="https://www.cs.cornell.edu/people/pabo/movie-review-data/",
    layouts=(
        Layout(
            {"all": ("rt-polarity.pos", "rt-polarity.neg")}, rows, record, split_of=lambda row: row[0],
            rule="the first 80% of each file are train, the next 10% dev, the last 10% test",
        ),
    ),
    originals=(
        Original(
            "https://storage.googleapis.com/seldon-datasets/sentence_polarity_v1/rt-polaritydata.tar.gz",
            "a05befe52aafda71d458d188a1c54506a998b1308613ba76bbda2e5029409ce9",
        ),
    ),
)  # fmt: skip
