# SPDX-License-Identifier: Apache-2.0
"""Spider: the answer's query gives the rows that the target's gives (Yu et al., 2018, execution match).

The question names its database, `For db_id:[NAME]`, which is `NAME/NAME.sqlite` under `eval.databases`. Queries run in
`sql_sandbox`.
"""

import contextlib
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

from llm_jepa_jax.config import EvalConfig
from llm_jepa_jax.data.records import Record
from llm_jepa_jax.data.sources import Source
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval.sql_compare import has_order, same_rows, shell_text
from llm_jepa_jax.eval.sql_sandbox import Result, Sandbox
from llm_jepa_jax.eval.task import RIGHT, AnswerTask, Judge, Skip, Verdict, the_answer, unparsed, wrong

DATABASE = re.compile(r"For db_id:\[([\w.-]+)\]")
THREADS = 4
SQLITE_MAGIC = b"SQLite format 3\0"
NOT_SQL = (
    "syntax error", "incomplete input", "unrecognized token", "one statement at a time", "no statement", "null char",
)  # fmt: skip
"""What SQLite says of text that is no query."""


def database_of(record: Record) -> str:
    """The database that the question names."""
    named = DATABASE.search(record.messages[-2].content)
    if not named or set(named[1]) == {"."}:
        raise Skip("the question names no database, `For db_id:[NAME]`")
    return named[1]


def file_of(config: EvalConfig, record: Record) -> pathlib.Path:
    name = database_of(record)
    return pathlib.Path(config.databases).expanduser() / name / f"{name}.sqlite"


def target(record: Record) -> str:
    database_of(record)
    return the_answer(record)


def check(config: EvalConfig, source: Source) -> None:
    """Every database that a record names is there."""
    if not config.databases:
        raise UserError("config: `eval.databases` is empty; spider needs the directory that holds NAME/NAME.sqlite")
    known: set[pathlib.Path] = set()
    for index in range(len(source)):
        with contextlib.suppress(Skip):
            path = file_of(config, source[index])
            if path not in known:
                _check_file(path, source.location(index))
                known.add(path)


def _check_file(path: pathlib.Path, where: str) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(SQLITE_MAGIC))
    except OSError as error:
        raise UserError(
            f"{where}: needs the database {path}: {error.strerror}; `eval.databases` holds NAME/NAME.sqlite for each"
        ) from error
    if magic != SQLITE_MAGIC:
        raise UserError(f"{path}: is no SQLite database; {where} needs it")


def compare(found: Result, wanted: Result, query: str) -> Verdict:
    """As lists of rows where the target's query has an order, else as bags."""
    if wanted.rows is None:
        raise Skip(f"the target's query gives no result: {wanted.error}")
    if found.rows is None:
        is_sql = found.limit or not any(words in found.error for words in NOT_SQL)
        return wrong(found.error) if is_sql else unparsed(found.error)
    if same_rows(found.rows, wanted.rows, has_order(query)):
        return RIGHT
    same_bag = same_rows(found.rows, wanted.rows, ordered=False)
    return wrong("the rows are in another order" if same_bag else "other rows")


def compare_as_published(found: Result, wanted: Result, query: str) -> Verdict:
    """What the `sqlite3` shell prints is the same text; a query that fails prints nothing."""
    if wanted.rows is None and wanted.limit:
        raise Skip(f"the target's query gives no result: {wanted.error}")
    printed, expected = (shell_text(result.rows or ()) for result in (found, wanted))
    return RIGHT if printed == expected else wrong(found.error or "prints other rows")


@contextlib.contextmanager
def session(
    how: Callable[[Result, Result, str], Verdict], config: EvalConfig, records: Sequence[Record]
) -> Iterator[Judge]:
    """Judges in as many processes as it has threads."""
    with Sandbox(config.sql_seconds, THREADS) as sandbox:

        def judge(record: Record, answer: str) -> Verdict:
            path, query = file_of(config, record), the_answer(record)
            return how(sandbox.run(path, answer), sandbox.run(path, query), query)

        yield judge


def _task(name: str, summary: str, how: Callable[[Result, Result, str], Verdict]) -> AnswerTask:
    opened = functools.partial(session, how)
    return AnswerTask(name, summary, open=opened, target=target, check=check, threads=THREADS)


TASKS = (
    _task("spider", "share of queries that give the target's rows", compare),
    _task("spider_published", "share of queries whose rows, printed, are the target's text", compare_as_published),
)
