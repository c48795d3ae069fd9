# SPDX-License-Identifier: Apache-2.0
"""Queries of a hostile model: nothing is written, nothing hangs, and each has the verdict it should have."""

import hashlib
import math
import os
import pathlib
import resource
import signal
import sqlite3
import time

import pytest

from llm_jepa_jax.eval import sql_sandbox
from llm_jepa_jax.eval.sql_compare import has_order, same_rows, shell_text
from llm_jepa_jax.eval.sql_sandbox import GRACE_SECONDS, Sandbox
from tests.databases import make_databases

SECONDS = 0.5


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    return make_databases(tmp_path_factory.mktemp("databases"))


@pytest.fixture(scope="module")
def concerts(databases):
    return databases / "concerts" / "concerts.sqlite"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SECONDS) as opened:
        yield opened


def everything(directory):
    """Every file below a directory with what it holds."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.rglob("*") if path.is_file()}


SYNTAX, ONE, NOTHING, TIME = "syntax error", "one statement", "no statement", "longer than"
DENIED = ("not authorized", "authorization denied")
NO_TABLE = (*DENIED, "prohibited", "vtable constructor failed", "no such table")
MANY = "(SELECT i FROM n)"
FOREVER = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
HOSTILE = {
    "insert": ("INSERT INTO singer VALUES (9, 'x', 'x', 1, 1)", DENIED),
    "insert returning": ("INSERT INTO singer(name) VALUES ('x') RETURNING *", DENIED),
    "update": ("UPDATE singer SET name = 'x'", DENIED),
    "update behind a CTE": ("WITH a AS (SELECT 1) UPDATE singer SET age = 1", DENIED),
    "delete": ("DELETE FROM singer", DENIED),
    "replace": ("REPLACE INTO singer(singer_id) VALUES (1)", DENIED),
    "drop": ("DROP TABLE singer", DENIED),
    "alter": ("ALTER TABLE singer RENAME TO s", DENIED),
    "create table": ("CREATE TABLE t (x)", DENIED),
    "create table as": ("CREATE TABLE t AS SELECT * FROM singer", DENIED),
    "create temporary table": ("CREATE TEMP TABLE t AS SELECT * FROM singer", DENIED),
    "create view": ("CREATE VIEW v AS SELECT 1", DENIED),
    "create temporary trigger": (
        "CREATE TEMP TRIGGER t AFTER INSERT ON singer BEGIN DELETE FROM singer; END", DENIED,
    ),
    "create index": ("CREATE INDEX i ON singer(age)", DENIED),
    "create virtual table": ("CREATE VIRTUAL TABLE v USING fts5(x)", DENIED),
    "write the schema": ("UPDATE sqlite_master SET sql = ''", ("may not be modified", *DENIED)),
    "attach": ("ATTACH DATABASE '{scratch}/new.sqlite' AS new", (*DENIED, "too many attached")),
    "attach memory": ("ATTACH ':memory:' AS m", (*DENIED, "too many attached")),
    "detach": ("DETACH DATABASE main", DENIED),
    "vacuum": ("VACUUM", DENIED),
    "vacuum into": ("VACUUM INTO '{scratch}/copy.sqlite'", DENIED),
    "reindex": ("REINDEX", DENIED),
    "analyze": ("ANALYZE", DENIED),
    "pragma write": ("PRAGMA user_version = 7", DENIED),
    "pragma schema": ("PRAGMA writable_schema = ON", DENIED),
    "pragma query_only off": ("PRAGMA query_only = 0", DENIED),
    "pragma journal": ("PRAGMA journal_mode = WAL", DENIED),
    "pragma temporary directory": ("PRAGMA temp_store_directory = '{scratch}'", DENIED),
    "pragma as a table": ("SELECT * FROM pragma_table_info('singer')", NO_TABLE),
    "pragma as a table, quoted": ('SELECT * FROM "pragma_database_list"', NO_TABLE),
    "begin": ("BEGIN EXCLUSIVE", DENIED),
    "savepoint": ("SAVEPOINT a", DENIED),
    "load extension": ("SELECT load_extension('{scratch}/evil.so')", DENIED),
    "tokenizer": ("SELECT fts3_tokenizer('simple', x'41414141')", DENIED),
    "shell writes a file": ("SELECT writefile('{scratch}/evil', 'x')", "no such function"),
    "shell reads a file": ("SELECT readfile('/etc/passwd')", "no such function"),
    "shell edits": ("SELECT edit('x', 'sh')", "no such function"),
    "csv": ("SELECT * FROM csv(filename='/etc/passwd')", "no such table"),
    "directory": ("SELECT * FROM fsdir('/')", "no such table"),
    "another schema": ("SELECT name FROM sqlite_temp_master", NO_TABLE),
    "a table made of a value": ("SELECT value FROM json_each('[1, 2]')", NO_TABLE),
    "pages of the file": ("SELECT data FROM sqlite_dbpage", NO_TABLE),
    "offset": ("SELECT sqlite_offset(name) FROM singer", (*DENIED, "no such function")),
    "two statements": ("SELECT 1; DROP TABLE singer", ONE),
    "two statements over a comment": ("SELECT 1; /* ; */ SELECT 2", ONE),
    "dot shell": (".shell touch {scratch}/evil", SYNTAX),
    "dot shell on a second line": ("SELECT 1;\n.shell touch {scratch}/evil", (SYNTAX, ONE)),
    "dot system behind a comment": ("-- x\n.system touch {scratch}/evil", SYNTAX),
    "dot output": (".output {scratch}/evil\nSELECT 1;", SYNTAX),
    "dot read": (".read /etc/passwd", SYNTAX),
    "dot open": (".open {scratch}/evil.sqlite", SYNTAX),
    "dot import": (".import '|touch {scratch}/evil' singer", (SYNTAX, "unrecognized token")),
    "nothing": ("", NOTHING),
    "white space": (" \n\t", NOTHING),
    "a comment": ("-- SELECT 1", NOTHING),
    "a comment that does not end": ("/* SELECT 1", NOTHING),
    "a semicolon": (";", NOTHING),
    "half a string": ("SELECT 'a", "unrecognized token"),
    "half a query": ("SELECT name FROM", "incomplete input"),
    "a null character": ("SELECT 1\0; DROP TABLE singer", "null char"),
    "half a surrogate": ("SELECT '\ud800'", "surrogates not allowed"),
    "full-width letters": ("ＤＲＯＰ TABLE singer", SYNTAX),
    "full-width semicolon": ("SELECT 1； DROP TABLE singer", ("unrecognized token", SYNTAX)),
    "no-break spaces": ("DROP\u00a0TABLE\u00a0singer", SYNTAX),
    "right to left": ("\u202eSELECT 1", SYNTAX),
    "prose": ("The query is: SELECT 1", SYNTAX),
    "a code fence": ("```sql\nSELECT 1\n```", (SYNTAX, "no such", "unrecognized")),
    "no such table": ("SELECT * FROM stars", "no such table"),
    "a word of the clock's": ("SELECT interrupted FROM singer", "no such column: interrupted"),
    "no such column": ("SELECT nme FROM singer", "no such column"),
    "recursion without end": (f"{FOREVER} SELECT count(*) FROM c", TIME),
    "recursion without end that gives rows": (f"{FOREVER} SELECT x FROM c", (TIME, "more than 100000 rows")),
    "recursion that grows": (
        "WITH RECURSIVE c(x) AS (SELECT 'aaaaaaaa' UNION ALL SELECT x || x FROM c) SELECT length(x) FROM c",
        "too big",
    ),
    "a huge join": (f"SELECT count(*) FROM {MANY}, {MANY}, {MANY}, {MANY}", TIME),
    "a huge join in order": (f"SELECT a.i FROM {MANY} a, {MANY} b, {MANY} c ORDER BY random() * b.i", (TIME, *DENIED)),
    "a huge sort": (f"SELECT a.i FROM {MANY} a, {MANY} b, {MANY} c ORDER BY a.i * b.i % 7, c.i", (TIME, "memory")),
    "a huge result": (f"SELECT a.i FROM {MANY} a, {MANY} b", "more than 100000 rows"),
    "a wide result": (f"SELECT printf('%.20000c', 'x') FROM {MANY}", ("bytes", "rows or")),
    "a huge blob": ("SELECT zeroblob(1000000000)", DENIED),
    "a random blob": ("SELECT hex(randomblob(500000000))", DENIED),
    "a huge replacement": (
        "SELECT length(replace(printf('%.900000c', 'x'), 'x', printf('%.900000c', 'y')))", ("too big", "memory"),
    ),
    "a huge group": (f"SELECT length(group_concat(printf('%.9000c', 'x'))) FROM {MANY}", ("too big", "memory")),
    "a search that never looks at the clock": (
        "SELECT instr(printf('%.999999c', 'a'), printf('%.499999c', 'a') || 'b')", (TIME, "did not answer", "died"),
    ),
    "a deep expression": ("SELECT " + "(" * 1000 + "1" + ")" * 1000, ("too large", "stack overflow")),
    "many terms": (" UNION ALL ".join(["SELECT 1"] * 500), "too many terms"),
    "many columns": ("SELECT " + ", ".join(["1"] * 2000), "too many columns"),
    "a long query": ("SELECT '" + "x" * 100_000 + "'", ("too large", "too big")),
    "many joins": ("SELECT 1 FROM " + ", ".join(["n"] * 100), "at most 64 tables"),
    "a parameter": ("SELECT ?", ("too many SQL variables", "Incorrect number", "variable number")),
}  # fmt: skip
NUMBERS = ("join", "sort", "huge result", "wide", "group", "joins")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_query_writes_nothing_and_does_not_hang(name, sandbox, databases, tmp_path):
    query, expected = HOSTILE[name]
    database = "numbers" if any(word in name for word in NUMBERS) else "concerts"
    before, start = everything(databases), time.monotonic()
    result = sandbox.run(databases / database / f"{database}.sqlite", query.replace("{scratch}", str(tmp_path)))
    assert time.monotonic() - start < SECONDS + GRACE_SECONDS + 20
    words = (expected,) if isinstance(expected, str) else expected
    assert result.rows is None and any(word in result.error for word in words), result
    assert everything(databases) == before and not list(tmp_path.iterdir())
    assert sandbox.run(databases / "concerts" / "concerts.sqlite", "SELECT count(*) FROM singer").rows == [(4,)]


def test_there_are_enough_hostile_queries():
    assert len(HOSTILE) >= 40


HONEST = {
    "SELECT name FROM singer WHERE age > 30 ORDER BY name;": [("Ann",), ("Joe",), ("Tim",)],
    "select Name, AGE from SINGER where name = 'Lý'  -- a comment": [("Lý", 29)],
    "SELECT count(*), avg(age), min(fee), max(fee), sum(seats) FROM singer, concert USING (singer_id)": [
        (3, 116 / 3, 10.5, 20.0, 240),
    ],
    "SELECT country FROM singer GROUP BY country HAVING count(*) >= 2": [("US",)],
    "SELECT name FROM singer EXCEPT SELECT name FROM old": [("Lý",)],
    "SELECT T1.name FROM singer AS T1 JOIN concert AS T2 ON T1.singer_id = T2.singer_id WHERE year LIKE '%15'": [
        ("Ann",),
    ],
    "WITH a AS (SELECT DISTINCT country FROM singer) SELECT count(*) FROM a": [(3,)],
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 3) SELECT x FROM c": [(1,), (2,), (3,)],
    "SELECT name FROM sqlite_master WHERE type = 'view'": [("old",)],
    "SELECT fee, x'00ff', 1e999, -1e999, 9223372036854775807 FROM singer WHERE singer_id = 3": [
        (None, b"\x00\xff", math.inf, -math.inf, 2**63 - 1),
    ],
    "SELECT CAST(x'ff41' AS TEXT)": [("\udcffA",)],
    "SELECT rank() OVER (ORDER BY age), upper(substr(name, 1, 1)) || '.' FROM singer LIMIT 1": [(1, "L.")],
    "VALUES (1, 'a;b')": [(1, "a;b")],
    "SELECT ifnull(length(printf('%1000000000d', 1)), 0) <= 1000000": [(1,)],
    "SELECT 1 FROM singer WHERE 1 = 0": [],
}  # fmt: skip


@pytest.mark.parametrize("query", HONEST)
def test_an_honest_query_gives_its_rows(query, sandbox, concerts):
    assert sandbox.run(concerts, query).rows == HONEST[query]


def test_a_process_that_does_not_answer_is_replaced(concerts, monkeypatch):
    """Stopped, and gone before it is asked."""
    monkeypatch.setattr(sql_sandbox, "GRACE_SECONDS", 0.3)
    with Sandbox(0.2) as sandbox:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            assert sandbox.run(concerts, "SELECT 1").rows == [(1,)]
            worker = sandbox._workers.get()
            sandbox._workers.put(worker)
            os.kill(worker._process.pid, number)
            result = sandbox.run(concerts, "SELECT 1")
            assert result.rows is None and result.limit and worker._process.poll() is not None
        assert sandbox.run(concerts, "SELECT 2").rows == [(2,)]
        left = sandbox._workers.get()
        sandbox._workers.put(left)
    assert left._process.poll() is not None


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux tells another process's limits")
def test_the_process_can_write_and_start_nothing(concerts):
    with Sandbox(5.0) as sandbox:
        sandbox.run(concerts, "SELECT 1")
        worker = sandbox._workers.get()
        sandbox._workers.put(worker)
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
            assert resource.prlimit(worker._process.pid, limit) == (0, 0)
        assert 0 < resource.prlimit(worker._process.pid, resource.RLIMIT_AS)[1] <= 1 << 30
        assert 0 < resource.prlimit(worker._process.pid, resource.RLIMIT_CPU)[0] < 60


def test_a_path_is_a_path(tmp_path, monkeypatch):
    """Characters that mean something in a URI do not here, and a relative one is the caller's."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a?mode=rwc&x=#b%20.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    with Sandbox(5.0) as sandbox:
        for given in (path, pathlib.Path(path.name)):
            assert sandbox.run(given, "SELECT count(*) FROM t").rows == [(0,)]
        assert "unable to open" in sandbox.run(tmp_path / "none.sqlite", "SELECT 1").error
        (tmp_path / "text.sqlite").write_text("not a database, but long enough to have a header " * 20)
        assert "not a database" in sandbox.run(tmp_path / "text.sqlite", "SELECT 1").error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a?mode=rwc&x=#b%20.sqlite", "text.sqlite"]


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order   by a limit 1", True),
        ("SELECT a FROM t ORDER /* x */ BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT a FROM t WHERE b = ' ORDER BY '", False),
        ('SELECT "ORDER BY" FROM t', False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a FROM t WHERE a IN (SELECT b FROM u ORDER BY b LIMIT 3)", False),
        ("SELECT a FROM t WHERE a IN (SELECT b FROM u) ORDER BY a", True),
        ("SELECT a, row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("SELECT 'it''s' FROM [order by] ORDER BY 1", True),
    ],
)
def test_an_order_is_that_of_the_whole_query(query, ordered):
    assert has_order(query) == ordered


@pytest.mark.parametrize(
    ("found", "wanted", "as_list", "as_bag"),
    [
        ([(1,), (2,)], [(1,), (2,)], True, True),
        ([(2,), (1,)], [(1,), (2,)], False, True),
        ([(1,)], [(1,), (1,)], False, False),
        ([(1, 2)], [(2, 1)], False, False),
        ([(1,)], [(1.0,)], True, True),
        ([("1",)], [(1,)], False, False),
        ([(None,)], [("",)], False, False),
        ([(b"a",)], [("a",)], False, False),
        ([(0.1 + 0.2,)], [(0.3,)], True, True),
        ([(0.3001,)], [(0.3,)], False, False),
        ([], [], True, True),
        ([], [(None,)], False, False),
    ],
)
def test_results_are_compared_as_lists_and_as_bags(found, wanted, as_list, as_bag):
    assert same_rows(found, wanted, ordered=True) == as_list
    assert same_rows(found, wanted, ordered=False) == as_bag


def test_values_are_printed_as_the_shell_prints_them():
    values = (None, 7, -(2**63), 1.0, 0.1 + 0.2, 1e20, 1e-5, math.inf, -math.inf, "a|b\nc", "a\0b", b"a\0b", "", "é")
    expected = "|7|-9223372036854775808|1.0|0.3|1.0e+20|1.0e-05|Inf|-Inf|a|b\nc|a|a||é\n"
    assert shell_text([values]) == expected and shell_text([(1,), (2,)]) == "1\n2\n" and shell_text([]) == ""
