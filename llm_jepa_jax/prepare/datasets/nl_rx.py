# SPDX-License-Identifier: Apache-2.0
"""NL-RX: descriptions of regular expressions, synthetic or by people (Locascio et al., 2016)."""

from llm_jepa_jax.prepare.dataset import DRAWN_RULE, DataSet, Layout, Line, conversation
from llm_jepa_jax.prepare.rows import parallel

SYSTEM = "Convert natural language to regular expression."
SPLITS = {"train": "train", "dev": "val", "test": "test"}


def record(row: tuple[str, str], where: str) -> Line:
    return conversation(SYSTEM, row[0].strip(), row[1].strip())


DATASET = DataSet(
    "nl_rx",
    licence="MIT",
    homepage="https://github.com/nicholaslocascio/deep-regex",
    layouts=(
        Layout({s: (f"src-{name}.txt", f"targ-{name}.txt") for s, name in SPLITS.items()}, parallel, record),
        Layout({"all": ("src.txt", "targ.txt")}, parallel, record, rule=DRAWN_RULE),
    ),
)
