# SPDX-License-Identifier: Apache-2.0
"""Tables of any kind become records by the names of their columns."""

import builtins
import json

import pytest

from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.prepare.columns import parse_columns
from llm_jepa_jax.prepare.tables import split_of

ROWS = [{"question": f"How many, {i}?", "query": f"SELECT {i}", "db": "music", "n": i} for i in range(5)]


def prepare(out, source, columns):
    return run(["main", "--mode=prepare", f"--source={source}", f"--out={out}", f"--columns={columns}"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def table():
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.Table.from_pylist(ROWS)


def test_a_parquet_directory_as_the_hub_has_it(table, tmp_path):
    import pyarrow.parquet

    data = tmp_path / "in" / "data"
    data.mkdir(parents=True)
    for name, rows in (
        ("train-00000-of-00002", table[:2]),
        ("train-00001-of-00002", table[2:4]),
        ("validation", table),
    ):
        pyarrow.parquet.write_table(rows, data / f"{name}.parquet", row_group_size=1)
    (tmp_path / "in" / "README.md").write_text("---\nlanguage: en\nlicense: cc-by-4.0\n---\na card")
    result = prepare(tmp_path / "out", tmp_path / "in", "text=question,code=query")
    assert result["splits"] == {"train": 4, "dev": 5} and len(result["sources"]) == 3
    assert result["licence"] == "cc-by-4.0"
    expected = [{"text": row["question"], "code": row["query"]} for row in ROWS]
    assert lines(tmp_path / "out" / "train.jsonl") == expected[:4]
    assert lines(tmp_path / "out" / "dev.jsonl") == expected
    with pytest.raises(UserError, match=r"parquet: no column `querry`; the columns are question, query, db, n"):
        prepare(tmp_path / "out2", tmp_path / "in", "text=question,code=querry")
    data.joinpath("validation.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"validation.parquet: cannot be read behind row 0"):
        prepare(tmp_path / "out", tmp_path / "in", "text=question,code=query")
    assert lines(tmp_path / "out" / "dev.jsonl") == expected, "what was there stays"


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_directories_of_save_to_disk(table, tmp_path, kind):
    import pyarrow

    directory = tmp_path / "in" / "test"
    directory.mkdir(parents=True)
    (directory / "state.json").write_text("{}")
    with getattr(pyarrow.ipc, f"new_{kind}")(str(directory / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    prepare(
        tmp_path / "out",
        tmp_path / "in",
        'system="Write SQL.",user={db}: {question}\\n({n}, of course),assistant=query',
    )
    first = lines(tmp_path / "out" / "test.jsonl")[1]["messages"]
    assert [turn["content"] for turn in first] == ["Write SQL.", "music: How many, 1?\n(1, of course)", "SELECT 1"]
    assert [turn["role"] for turn in first] == ["system", "user", "assistant"]


def test_csv_and_json(tmp_path):
    (tmp_path / "a.csv").write_text('\ufeffquestion,query\n"x,\ny",b\nc,\n')
    result = prepare(tmp_path / "csv", tmp_path / "a.csv", "text=question,code=query")
    assert lines(tmp_path / "csv" / "train.jsonl") == [{"text": "x,\ny", "code": "b"}]
    assert result["dropped"] == {"blank `query`": 1}
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1))
    prepare(tmp_path / "json", tmp_path / "b.json", "document={question} {query}")
    assert lines(tmp_path / "json" / "train.jsonl")[4] == {"text": "How many, 4? SELECT 4"}
    (tmp_path / "c.tsv").write_text("question\tquery\na\n")
    with pytest.raises(UserError, match=r"c.tsv:2: 1 fields, where the first line names 2"):
        prepare(tmp_path / "tsv", tmp_path / "c.tsv", "text=question,code=query")


def test_conversations_and_groups(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"chat": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "same": ["p", "q"]})
        + "\n"
        + json.dumps({"chat": [{"role": "user", "content": "a"}], "same": ["p"]})
        + "\n"
    )
    result = prepare(tmp_path / "chat", tmp_path / "d.jsonl", "messages=chat")
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert lines(tmp_path / "chat" / "train.jsonl") == [{"messages": expected}]
    assert result["dropped"] == {"`chat` ends without an answer": 1}
    result = prepare(tmp_path / "group", tmp_path / "d.jsonl", "group=same")
    assert lines(tmp_path / "group" / "train.jsonl") == [{"group": ["p", "q"]}]
    assert result["dropped"] == {"fewer than 2 members in `same`": 1}
    assert len(JsonlSource(tmp_path / "group" / "train.jsonl")) == 1
    with pytest.raises(UserError, match=r"d.jsonl:1: column `chat` is list; text or a number"):
        prepare(tmp_path / "wrong", tmp_path / "d.jsonl", "document=chat")


def test_columns_that_make_no_record():
    assert parse_columns('system="Say, {a}.",user=a, b,assistant=c\\n{d}').values == {
        "system": "Say, {a}.", "user": "{a, b}", "assistant": "c\n{d}",
    }  # fmt: skip
    for text, match in (
        ("question=a", "'question=a' is no PART=COLUMN"),
        ("text=a", "these parts make no record"),
        ("text=a,text=b", "`text` comes twice"),
        ("document=a,code=b", "these parts make no record"),
        ("group={a} and {b}", "`group` takes the name of one column"),
        ("user=,assistant=b", "'user=' is no PART=COLUMN"),
    ):
        with pytest.raises(UserError, match=match):
            parse_columns(text)


def test_splits_are_told_by_names():
    names = {
        "data/train-00000-of-00002.parquet": "train",
        "validation/a.csv": "dev",
        "x_test.jsonl": "test",
        "a": "train",
    }
    assert {name: split_of(name) for name in names} == names
    assert split_of("contest/latest.csv") == "train", "parts of words are none"


def test_libraries_that_are_not_there_are_named(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *more):
        if name.partition(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return original(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="needs pyarrow, which is not installed"):
        prepare(tmp_path / "out", tmp_path / "a.parquet", "document=a")
    with pytest.raises(UserError, match="no such file; to read it from the hub, `pip install datasets`"):
        prepare(tmp_path / "out", "nobody/nothing", "document=a")
