# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import pickle

import numpy as np
import pytest

from llm_jepa_jax.config import DataConfig
from llm_jepa_jax.data import synthetic
from llm_jepa_jax.data.records import Pair, parse_records
from llm_jepa_jax.data.sources import JsonlSource, absolute_paths, open_splits
from llm_jepa_jax.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def line(*roles, content="x"):
    return json.dumps({"messages": [{"role": role, "content": content} for role in roles]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"messages": [', "not JSON at column"),
        ("[1]", "a record is a JSON object, not list"),
        ("{}", "missing key `messages`"),
        ('{"code": "a"}', "`code` without `text`"),
        ('{"text": "a", "code": 3}', "`code` is int; it must be a string"),
        (
            '{"text": "a", "code": [{"role": "user", "content": "b"}]}',
            "`code` is a list; it must be a string, or one turn",
        ),
        ('{"text": [{"role": "user", "content": " "}], "code": "b"}', "`text[0].content` is empty"),
        ('{"text": "a", "code": "b", "label": 1}', "unknown key `label`"),
        ('{"messages": []}', "must be a list of turns"),
        (line("assistant", "user"), "`messages[0].role`='assistant' out of order; 'user' comes here"),
        (line("user", "user"), "`messages[1].role`='user' out of order"),
        (line("user", "system", "assistant"), "`messages[1].role`='system' out of order"),
        (line("user"), "its last turn must be the assistant's"),
        (line("human", "assistant"), "`messages[0].role`='human'; use one of"),
        (line("user", "assistant", content="  "), "`messages[0].content` is empty"),
        ('{"messages": [{"role": "user"}]}', "nothing more or less"),
    ],
)
def test_wrong_records_name_place_and_fix(text, words):
    with pytest.raises(UserError) as caught:
        parse_records(text, "data.jsonl:7")
    message = str(caught.value)
    assert message.startswith("data.jsonl:7: ") and words in message and "\n" not in message


def test_views_of_records():
    (record,) = parse_records(line("system", "user", "assistant", "user", "assistant"), "f:1")
    assert record.pairs("last") == (Pair("x", "x", 3),) and record.pairs("turns") == (("x", "x", 1), ("x", "x", 3))
    (record,) = parse_records('{"text": "t", "code": "c"}', "f:1")
    assert [message.role for message in record.messages] == ["user", "assistant"]
    (record,) = parse_records(json.dumps(GOOD | {"text": "t", "code": "c"}), "f:1")
    assert record.pairs("last") == record.pairs("turns") == (("t", "c", -1),) and record.messages[0].content == "q"
    turns = {"text": [{"role": "user", "content": "t"}], "code": [{"role": "assistant", "content": "c"}]}
    (record,) = parse_records(json.dumps(GOOD | turns), "f:1")
    assert record.pairs("last") == (("t", "c", -1),)
    pairs = [{"text": "q", "code": "c"}, {"text": "t", "code": "d"}]
    (record,) = parse_records(json.dumps(GOOD | {"pairs": pairs}), "f:1")
    assert record.pairs("last") == (("q", "c", 0), ("t", "d", -1))
    (record,) = parse_records('{"text": "a. b"}', "f:1")
    assert record.pairs("turns") == record.messages == () and [*record.contents()] == ["a. b"]


def test_random_access_lines_and_pickling(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"t{i}", "code": "é" * i + "c"}, ensure_ascii=False) for i in range(5)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", *lines[1:]]).encode())
    source = JsonlSource(path)
    source[3]  # opens the map, which must not be pickled
    for one in (source, pickle.loads(pickle.dumps(source))):
        assert [one[i].messages[0].content for i in (4, 0, 2)] == ["t4", "t0", "t2"]
        assert len(one) == 5 and one.location(1) == f"{path}:3"


def test_wrong_files_name_the_fix(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        JsonlSource(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="Is a directory"):
        JsonlSource(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="the file is empty"):
        JsonlSource(tmp_path / "empty.jsonl")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="no records"):
        JsonlSource(tmp_path / "blank.jsonl")
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    with pytest.raises(UserError, match="run `gunzip"):
        JsonlSource(tmp_path / "a.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a", "code": "b"}\n{"text": "\xe9", "code": "b"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:2: not UTF-8"):
        JsonlSource(tmp_path / "latin.jsonl")[1]


def test_splits_and_weights(tmp_path):
    for name, count in (("a", 30), ("b", 10)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{i}", "code": "c"}) + "\n" for i in range(count))
        )
    spec = f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl * 2.5"
    splits = open_splits(DataConfig(train=spec, eval_share=0.2), seed=1)
    train = [splits.train[i].messages[0].content for i in range(len(splits.train))]
    held = [splits.eval[i].messages[0].content for i in range(len(splits.eval))]
    assert len(held) == 8 and not set(train) & set(held) and len(set(train)) == 32
    assert all(weight == (2.5 if text[0] == "b" else 1.0) for text, weight in zip(train, splits.weights, strict=True))
    other = open_splits(DataConfig(train=f"{tmp_path}/a.jsonl", eval=f"{tmp_path}/b.jsonl"), seed=1)
    assert (len(other.train), len(other.eval)) == (30, 10)
    with pytest.raises(UserError, match="number above 0"):
        open_splits(DataConfig(train=f"{tmp_path}/a.jsonl*-1"), seed=1)
    with pytest.raises(UserError, match="leaves a split empty"):
        open_splits(DataConfig(train=f"{tmp_path}/b.jsonl", eval_share=0.01), seed=1)


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = absolute_paths(DataConfig(train="a.jsonl * 2,synthetic", eval=""))
    assert config.train == f"{tmp_path}/a.jsonl*2,synthetic" and config.eval == ""


def test_synthetic_corpus_is_large_distinct_and_repeatable():
    train, held = synthetic.generate(10000, 1000)
    again = synthetic.generate(10000, 1000)
    assert (train, held) == again
    assert synthetic.generate(50, 5, seed=1) != synthetic.generate(50, 5)
    records = train + held
    texts, codes = zip(*([message.content for message in record.messages] for record in records), strict=True)
    assert len(set(texts)) == len(set(codes)) == 11000
    for sign in ("&", "~(", "{", "|", "){0,"):
        assert np.mean([sign in code for code in codes]) > 0.05, sign
    for code in codes:
        assert code.count("(") == code.count(")")


def test_synthetic_corpus_refuses_what_it_cannot_give(monkeypatch):
    monkeypatch.setattr(synthetic, "MAX_DEPTH", 0)
    monkeypatch.setattr(synthetic, "WORDS", ("moon",))
    monkeypatch.setattr(synthetic, "ATTEMPTS_PER_RECORD", 1)
    with pytest.raises(UserError, match="the grammar gives"):
        synthetic.generate(10**4, 10)
