# SPDX-License-Identifier: Apache-2.0
"""Shards of tokens train as the JSONL files they were made of, to the last bit, and say so where they would not."""

import json
import multiprocessing
import pickle
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa_jax.data import shards as shards_module
from llm_jepa_jax.data.shard_files import decode, encode
from llm_jepa_jax.data.shards import ShardSource
from llm_jepa_jax.data.sources import JsonlSource, open_splits
from llm_jepa_jax.data.tokenized import tokenize_record
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.prepare import line_ranges
from llm_jepa_jax.prepare.line_ranges import cut
from llm_jepa_jax.prepare.shards import prepare_shards
from llm_jepa_jax.text.tokenizer import load_tokenizer
from tests.chat_families import write_family
from tests.conftest import small_config, small_data

WORDS = ("a line", "with a digit", "twice", "and ünïcode", "or none of it. It ends.", "Never so!")


def line_of(number):
    """Conversations with one exchange or several and named views, pairs, groups, and plain text."""
    say = " ".join(WORDS[(number * k) % len(WORDS)] for k in range(1, 2 + number % 4))
    turns = [{"role": "user", "content": f"{say} {number}"}, {"role": "assistant", "content": f"[{number}]"}]
    if number % 7 == 1:
        return {"text": f"{say} One. Two {number}. Three."}
    if number % 7 == 2:
        return {"group": [f"{say} {number}", f"{number} {say}", f"{number}: {say}?"]}
    if number % 7 == 3:
        return {"text": f"{say} {number}", "code": f".*{number}"}
    if number % 7 == 4:
        return {"messages": [{"role": "system", "content": "Say it."}, *turns, *turns]}
    if number % 7 == 5:
        return {"messages": turns, "pairs": [{"text": say, "code": str(number)}, {"text": "x", "code": "y"}]}
    return {"messages": turns}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files with blank lines, a byte order mark, and a last line without an end."""
    directory = tmp_path_factory.mktemp("jsonl")
    texts = [json.dumps(line_of(number), ensure_ascii=False) for number in range(150)]
    (directory / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(texts[:90]).encode())
    (directory / "b.jsonl").write_bytes("\n".join(["", *texts[90:], "  ", ""]).encode())
    return directory


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    tokenizer.save_model(path)
    return path


def prepared(files, out, tokenizer_file, cache_dir, names=("a.jsonl",), count=4, processes=1, **data):
    config = small_config(cache_dir, text={"tokenizer": str(tokenizer_file)}, data=data)
    return prepare_shards(config, ",".join(str(files / name) for name in names), count, processes, out)


@pytest.fixture(scope="module")
def directory(files, tokenizer_file, cache_dir, tmp_path_factory):
    """Both files as shards."""
    out = tmp_path_factory.mktemp("shards") / "both"
    prepared(files, out, tokenizer_file, cache_dir, ("a.jsonl", "b.jsonl"), count=5)
    return out


def both(files):
    return f"{files / 'a.jsonl'},{files / 'b.jsonl'}"


def test_they_are_the_source_that_they_were_made_of(files, directory, cache_dir):
    jsonl = open_splits(small_config(cache_dir, data={"train": both(files)}).data, 0)
    shards = open_splits(small_config(cache_dir, data={"train": str(directory)}).data, 0)
    for one, other in ((jsonl.train, shards.train), (jsonl.eval, shards.eval)):
        assert len(one) == len(other) and one.content_hash == other.content_hash
        np.testing.assert_array_equal(one.lines, other.lines)
        assert [one[i] for i in range(len(one))] == [other[i] for i in range(len(other))]
        assert [one.location(i) for i in range(len(one))] == [other.location(i) for i in range(len(other))]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert len(manifest["shards"]) == 5 and manifest["records"] == len(ShardSource(directory)) > 150
    assert manifest["num_pairs"] == ShardSource(directory).index["pairs"].sum()


CASES = {
    "separate": {},
    "shared": {"data": {"layout": "shared"}},
    "padded": {"data": {"layout": "padded"}, "objective": {"ntp": {"targets": "all"}}},
    "stp": {"data": {"row_length": 512}, "objective": {"stp": {"weight": 1.0, "mode": "mask_recover"}}},
    "sentences": {"data": {"text_views": "sentence"}, "objective": {"jepa": {"dropout": 0.5}}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mixed", ["alone", "beside JSONL"])
def test_batches_are_the_same_bits(files, directory, cache_dir, tokenizer, case, mixed):
    """All steps of two epochs, held-out lines left out, weights drawn."""
    changes = {name: dict(values) for name, values in CASES[case].items()}
    jepa = {"num_predictors": 2} | changes.get("objective", {}).pop("jepa", {})
    more = f",{files / 'b.jsonl'}*1.5" if mixed != "alone" else ""
    if case == "shared":  # which reads the text view in a turn: of pairs that have one
        jepa |= {"view_end": "content"}
    found = []
    for train in (both(files), str(directory)):
        data = {"train": train + more, "eval_share": 0.1} | changes.get("data", {})
        if case == "shared":
            data |= {"train": str(only_turns(files, directory, train, cache_dir, tokenizer))}
        objective = {"jepa": jepa} | changes.get("objective", {})
        config = small_config(cache_dir, data=data, objective=objective, train={"num_steps": 0, "num_epochs": 2})
        found.append(small_data(config, tokenizer))
    jsonl, shards = found
    assert len(jsonl.steps()) == len(shards.steps()) > 2
    shards_steps = pickle.loads(pickle.dumps(shards.steps()))  # as Grain's processes get it
    for step in range(len(jsonl.steps())):
        one, other = jsonl.steps()[step], shards_steps[step]
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    iterator, last = shards.iterator(2), jsonl.steps()[2]
    np.testing.assert_array_equal(next(iterator)["tokens"], last["tokens"])  # resumed in the middle
    iterator.close()


def only_turns(files, directory, train, cache_dir, tokenizer):
    """The records without views that are no turn: as JSONL, or as shards of it."""
    path = files / "turns.jsonl"
    path.write_text("".join(json.dumps(line_of(n)) + "\n" for n in range(150) if n % 7 != 5))
    if train != str(directory):
        return path
    out = directory.parent / "turns"
    if not out.exists():
        model = directory.parent / "small.model"
        tokenizer.save_model(model)
        prepared(files, out, model, cache_dir, ("turns.jsonl",))
    return out


def test_a_record_is_read_as_it_was_written(files, tokenizer):
    source = JsonlSource(files / "a.jsonl")
    for index in range(len(source)):
        for kind in (np.uint16, np.int32):
            tokens = tokenize_record(source[index], tokenizer, "turns", "")
            read = decode(encode(tokens, source[index], kind), kind)
            assert read.record() == source[index]
            np.testing.assert_array_equal(read.conversation, tokens.conversation)
            np.testing.assert_array_equal(read.assistant_target, tokens.assistant_target)
            assert [v.tolist() for v in read.views[::2]] == [v.tolist() for v in tokens.views["text"]]
            assert [v.tolist() for v in read.views[1::2]] == [v.tolist() for v in tokens.views["code"]]


def test_many_shards_are_not_all_open(directory, monkeypatch):
    monkeypatch.setattr(shards_module, "MOST_OPEN", 2)
    few, all_open = ShardSource(directory), ShardSource(directory)
    order = np.random.default_rng(0).permutation(len(few)).tolist()
    read = [few[i] for i in order]
    monkeypatch.undo()
    assert read == [all_open[i] for i in order] and len(few._readers) == 2 < len(all_open._readers)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_is_whole_is_kept_and_the_rest_is_made_again(files, directory, tokenizer_file, cache_dir, tmp_path):
    out = tmp_path / "out"
    names = ("a.jsonl", "b.jsonl")
    assert prepared(files, out, tokenizer_file, cache_dir, names, count=5)["kept"] == 0
    whole = contents(out)
    assert whole == contents(directory), "the same bytes, whenever and wherever"
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.array_record")}
    damaged = bytearray(whole["shard-00001-of-00005.array_record"])
    damaged[40] ^= 1
    (out / "shard-00001-of-00005.array_record").write_bytes(damaged)
    (out / "shard-00003-of-00005.json").unlink()  # as killed before its end
    (out / ".shard-00004-of-00005.array_record.part").write_bytes(b"left by a kill")
    (out / "shard-00004-of-00005.index.npz").write_bytes(b"")
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="the shards are not finished; run its --mode=prepare command again"):
        ShardSource(out)
    assert prepared(files, out, tokenizer_file, cache_dir, names, count=5)["kept"] == 2
    assert contents(out) == whole
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.array_record")}
    assert sorted(name for name in times if times[name] == after[name]) == [
        "shard-00000-of-00005.array_record", "shard-00002-of-00005.array_record",
    ]  # fmt: skip


def test_processes_write_what_one_writes_and_stop_at_a_wrong_line(
    files, directory, tokenizer_file, cache_dir, tmp_path
):
    out = tmp_path / "out"
    names = ("a.jsonl", "b.jsonl")
    result = prepared(files, out, tokenizer_file, cache_dir, names, count=5, processes=2)
    assert contents(out) == contents(directory) and result["tokens_per_s"] > 0
    good = [json.dumps(line_of(number)) for number in range(40)]
    (tmp_path / "wrong.jsonl").write_text("\n".join([*good, '{"messages": []}', *good]))
    with pytest.raises(UserError, match=r"wrong.jsonl:41: `messages` must be a list of turns"):
        prepared(tmp_path, tmp_path / "wrong", tokenizer_file, cache_dir, ("wrong.jsonl",), processes=2)
    assert not (tmp_path / "wrong" / "manifest.json").exists() and not multiprocessing.active_children()
    assert not list((tmp_path / "wrong").glob(".*"))


def test_a_full_disk_ends_with_one_line(files, tokenizer_file, cache_dir, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))  # a shard is at least 192 KiB
    try:
        with pytest.raises(UserError, match=r"cannot be written \(.*; make room, then run the same command again"):
            prepared(files, tmp_path / "out", tokenizer_file, cache_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").glob("*.array_record")) and not list((tmp_path / "out").glob(".*"))
    assert prepared(files, tmp_path / "out", tokenizer_file, cache_dir)["kept"] == 0


def test_shards_that_do_not_fit_the_run(files, directory, tokenizer_file, cache_dir, tmp_path, tokenizer, monkeypatch):
    def train(where=directory, **data):
        config = small_config(cache_dir, data={"train": str(where), **data}, train={"num_steps": 2})
        return small_data(config, tokenizer)

    with pytest.raises(UserError, match=r"has the pairs of `data.pairs`=last, not turns"):
        train(pairs="turns")
    with monkeypatch.context() as patched:
        patched.setattr(type(tokenizer), "fingerprint", "0" * 64, raising=False)
        tokenizer.fingerprint, kept = "f" * 64, tokenizer.fingerprint
        with pytest.raises(UserError, match="its tokens are of another tokenizer or chat template"):
            train()
        tokenizer.fingerprint = kept
    with monkeypatch.context() as patched:
        patched.setattr(shards_module, "VERSION", "0")
        with pytest.raises(UserError, match="was made by another version of this program"):
            train()
    assert ShardSource(directory).tokenizer().fingerprint == tokenizer.fingerprint
    for again, match in ((("b.jsonl",), "holds shards of another `inputs`"), (("a.jsonl", "b.jsonl"), "`num_shards`")):
        with pytest.raises(UserError, match=match):
            prepared(files, directory, tokenizer_file, cache_dir, again, count=5 if len(again) == 1 else 3)
    out = tmp_path / "out"
    prepared(files, out, tokenizer_file, cache_dir)
    shard = out / "shard-00002-of-00004"
    index, data = (shard.with_name(shard.name + end) for end in (".index.npz", ".array_record"))
    damaged = bytearray(data.read_bytes())
    damaged[64:2000] = bytes(1936)
    data.write_bytes(damaged)
    with pytest.raises(UserError, match=r"record \d+ cannot be read .*--mode=prepare command again"):
        [ShardSource(out).read(i) for i in range(len(ShardSource(out)))]
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00002-of-00004.index.npz: is missing or damaged"):
        train(out)
    data.write_bytes(damaged[:-1])
    with pytest.raises(UserError, match=r"00002-of-00004.array_record: is missing or cut"):
        train(out)


def test_a_checkpoints_tokenizer_is_kept_with_its_template(tmp_path, cache_dir):
    family = write_family("qwen3", tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line_of(n)) + "\n" for n in range(0, 140, 7)))
    prepared(tmp_path, tmp_path / "out", family, cache_dir, pairs="turns")
    source, named = ShardSource(tmp_path / "out"), load_tokenizer(family)
    assert source.manifest["tokenizer"] == named.fingerprint == source.tokenizer().fingerprint
    source.check(source.tokenizer(), "turns")
    with pytest.raises(UserError, match="of another tokenizer or chat template"):
        source.check(load_tokenizer(family, "plain"), "turns")


def test_wrong_commands(files, tokenizer_file, tmp_path):
    def prepare(*arguments):
        return run(["main", "--mode=prepare", f"--out={tmp_path / 'out'}", *arguments])

    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    (tmp_path / "packed.jsonl").write_bytes(b"\x1f\x8b")
    blank = [f"--source={tmp_path / 'blank.jsonl'}", f"--config.text.tokenizer={tokenizer_file}"]
    model = "--config.text.vocab_size=200"
    for arguments, match in (
        (["--shards=2"], "--shards reads JSONL files; pass --source"),
        (["--shards=2", f"--source={tmp_path}"], "is a directory; --shards reads JSONL files"),
        (["--shards=2", f"--source={tmp_path / 'none.jsonl'}"], "No such file or directory; name JSONL files"),
        (["--shards=2", f"--source={tmp_path / 'empty.jsonl'}"], "the file is empty"),
        (["--shards=2", f"--source={tmp_path / 'packed.jsonl'}"], "gzip cannot be cut"),
        (["--shards=2", f"--source={files / 'a.jsonl'}", "--sha256=1"], "--sha256: belongs to --dataset"),
        (["--shards=1", *blank], "has no records; each line holds one JSON object"),
        (["--processes=2", "--dataset=gsm8k"], "--processes: belongs to --shards"),
        (["--shards=2", f"--source={files / 'a.jsonl'}", model], "`text.vocab_size`=200 must be above"),
    ):
        with pytest.raises(UserError, match=match):
            prepare(*arguments)
    (tmp_path / "manifest.json").write_text('{"made": "gsm8k"}')
    with pytest.raises(UserError, match="its manifest.json is none of shards; name a JSONL file"):
        ShardSource(tmp_path)
    with pytest.raises(UserError, match="is a directory; name a JSONL file, or one of shards"):
        ShardSource(files)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["", "a", "bb" * 9, "\r"]), min_size=1, max_size=12), min_size=1, max_size=3
    ),
    count=st.integers(1, 9),
    ends=st.booleans(),
    piece=st.integers(1, 40),
)
def test_ranges_are_the_files_cut_between_lines(tmp_path_factory, texts, count, ends, piece):
    directory = tmp_path_factory.mktemp("ranges")
    paths = []
    for number, lines in enumerate(texts):
        paths.append(directory / str(number))
        paths[-1].write_bytes(("\n".join([*lines, "x"]) + ("\n" if ends else "")).encode())
    before, line_ranges.CHUNK = line_ranges.CHUNK, piece
    try:
        inputs, parts = cut(paths, count)
    finally:
        line_ranges.CHUNK = before
    assert 1 <= len(parts) <= count and all(parts)
    spans = [span for part in parts for span in part]
    sizes = [sum(span.stop - span.start for span in part) for part in parts]
    assert max(sizes) <= sum(sizes) / count + 20, "a part is at most a line longer than its share"
    assert b"".join(paths[s.file].read_bytes()[s.start : s.stop] for s in spans) == b"".join(
        p.read_bytes() for p in paths
    )
    for span in spans:
        before_it = paths[span.file].read_bytes()[: span.start]
        assert span.line == before_it.count(b"\n") + 1 and before_it[-1:] in (b"", b"\n")
    found = [(span.file, number, text) for span in spans for number, _, text in span.lines()]
    expected = [
        (i, number, line)
        for i, path in enumerate(paths)
        for number, line in enumerate(path.read_bytes().decode().split("\n"), start=1)
        if line.strip()
    ]
    assert found == expected and [file.size for file in inputs] == [path.stat().st_size for path in paths]
