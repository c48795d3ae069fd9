# SPDX-License-Identifier: Apache-2.0
"""Spider: questions to databases and their SQL (Yu et al., 2018)."""

from collections.abc import Callable, Mapping
from typing import Any

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.prepare.dataset import DataSet, Layout, Line, Original, conversation, text_field
from llm_jepa_jax.prepare.rows import json_list
from llm_jepa_jax.prepare.source_files import SourceFile

SYSTEM = "Convert natural language to SQL."
TABLES = ("tables.json", "test_tables.json")


def record(row: Any, where: str) -> Line:
    """The question names its database, and nothing of its schema, as the published files do."""
    question, database = text_field(row, "question", where), text_field(row, "db_id", where)
    user = f"For db_id:[{database}]\n\n{question}" if question.strip() else ""
    return conversation(SYSTEM, user, text_field(row, "query", where))


def check(files: Mapping[str, SourceFile]) -> Callable[[Any, str], None]:
    """A row's database must be one of `tables.json`, where that is there."""
    tables = [file for name, file in files.items() if name in TABLES]
    names = {text_field(table, "db_id", where) for file in tables for where, table in json_list(file)}

    def check_row(row: Any, where: str) -> None:
        if names and text_field(row, "db_id", where) not in names:
            raise UserError(
                f"{where}: `db_id`={row['db_id']!r} is not in {tables[0].origin}; take both from one release"
            )

    return check_row


DATASET = DataSet(
    "spider",
    licence="CC BY-SA 4.0",
    homepage="https://yale-lily.github.io/spider",
    layouts=(
        Layout(
            {
                "train": ("train_spider.json",),
                "train_others": ("train_others.json",),
                "dev": ("dev.json",),
                "test": ("test.json",),
            },
            json_list,
            record,
        ),
    ),
    originals=(
        Original(
            "https://huggingface.co/datasets/spider/resolve/main/data/spider.zip",
            "5ddff97bb1d421282c593e8d30ce0ce107270f4dd4a21d60eba4bf287d5956b1",
        ),
    ),
    extra=TABLES,
    check=check,
)
