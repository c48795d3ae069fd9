# SPDX-License-Identifier: Apache-2.0
"""Published data sets and tables become the records that training reads, and nothing is lost uncounted."""

import gzip
import hashlib
import http.server
import io
import json
import shutil
import ssl
import subprocess
import tarfile
import threading
import zipfile

import pytest

from llm_jepa_jax.data.records import parse_records
from llm_jepa_jax.data.sources import JsonlSource
from llm_jepa_jax.errors import TryAgainError, UserError
from llm_jepa_jax.main import run
from llm_jepa_jax.prepare import download
from llm_jepa_jax.prepare.dataset import known


def prepare(out, source, *more):
    return run(["main", "--mode=prepare", f"--source={source}", f"--out={out}", *more])


def records(path):
    source = JsonlSource(path)
    return [source[i] for i in range(len(source))]


def published(shared_dir, name):
    return [json.loads(line) for line in (shared_dir / "data" / name).read_text().splitlines()]


def contents(lines):
    return [[message["content"] for message in line["messages"][1:]] for line in lines]


def write_lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_gsm8k_is_the_published_file_byte_for_byte(shared_dir, tmp_path):
    lines = contents(published(shared_dir, "gsm8k_test.jsonl"))
    file = write_lines(tmp_path / "in" / "test.jsonl", [{"question": q, "answer": a} for q, a in lines])
    result = prepare(tmp_path / "out", file.parent, "--dataset=gsm8k")
    assert (tmp_path / "out" / "test.jsonl").read_bytes() == (shared_dir / "data" / "gsm8k_test.jsonl").read_bytes()
    assert result["sources"][0]["original"] == known()["gsm8k"].originals[1].url, "the recorded checksum is this one"
    assert result["splits"] == {"test": 1319} and not result["dropped"] and result["licence"] == "MIT"


def test_nl_rx_without_splits(shared_dir, tmp_path):
    lines = published(shared_dir, "synth_train.jsonl") + published(shared_dir, "synth_test.jsonl")
    for name, number in (("src.txt", 0), ("targ.txt", 1)):
        (tmp_path / name).write_text("".join(both[number] + "\n" for both in contents(lines)))
    result = prepare(tmp_path / "out", f"{tmp_path / 'src.txt'},{tmp_path / 'targ.txt'}", "--dataset=nl_rx")
    splits = {split: records(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    expected = [parse_records(json.dumps(line), "")[0] for line in lines]
    assert sorted(map(repr, sum(splits.values(), []))) == sorted(map(repr, expected))
    tested = set(splits["test"])
    assert [record for record in expected if record in tested] == splits["test"], "the order of the source"
    asked = {split: {record.messages[1].content for record in found} for split, found in splits.items()}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["dev"] and not asked["dev"] & asked["test"]
    assert 7700 < result["splits"]["train"] < 8300 and "sha256" in result["split_rule"]
    for name in ("src.txt", "targ.txt"):
        (tmp_path / name).write_text("".join((tmp_path / name).open().readlines()[:200]))
    source = f"{tmp_path / 'src.txt'},{tmp_path / 'targ.txt'}"
    by_seed = [prepare(tmp_path / "other", source, "--dataset=nl_rx", f"--config.seed={seed}") for seed in (0, 1)]
    assert by_seed[0]["splits"] != by_seed[1]["splits"]
    prepare(tmp_path / "other", source, "--dataset=nl_rx")
    held_out = set(splits["dev"])
    stayed = [record for record in expected[:200] if record in held_out]
    assert records(tmp_path / "other" / "dev.jsonl") == stayed, "others have gone"


def test_spider_in_an_archive(shared_dir, tmp_path):
    lines = contents(published(shared_dir, "spider_train.jsonl"))
    rows = []
    for question, query in lines:
        head, _, asked = question.partition("\n\n")
        rows.append({"db_id": head[len("For db_id:[") : -1], "question": asked, "query": query, "sql": {}})
    tables = [{"db_id": name} for name in sorted({row["db_id"] for row in rows})]
    archive = tmp_path / "spider.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("spider/train_spider.json", json.dumps(rows))
        file.writestr("spider/tables.json", json.dumps(tables))
        file.writestr("__MACOSX/spider/._train_spider.json", b"\0")
    prepare(tmp_path / "out", archive, "--dataset=spider")
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == (shared_dir / "data" / "spider_train.jsonl").read_bytes()
    (tmp_path / "tables.json").write_text(json.dumps(tables[1:]))
    (tmp_path / "train_spider.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=rf"entry \d+: `db_id`='{tables[0]['db_id']}' is not in .*tables.json"):
        prepare(tmp_path / "less", f"{tmp_path / 'train_spider.json'},{tmp_path / 'tables.json'}", "--dataset=spider")


def test_nq_open_and_hellaswag(shared_dir, tmp_path):
    lines = contents(published(shared_dir, "nq_open_test.jsonl"))
    name = "NQ-open.efficientqa.test.1.1.jsonl"
    write_lines(tmp_path / "nq" / name, [{"question": q, "answer": a.split("; ")} for q, a in lines])
    prepare(tmp_path / "nq_out", tmp_path / "nq", "--dataset=nq_open")
    assert (tmp_path / "nq_out" / "test.jsonl").read_bytes() == (
        shared_dir / "data" / "nq_open_test.jsonl"
    ).read_bytes()

    rows = []
    for line in published(shared_dir, "hellaswag_test.jsonl"):
        context, question, letter = line["text"][0]["content"], *contents([line])[0]
        places = [question.index(f"\n{other}) ", len(context)) for other in "ABCD"] + [len(question)]
        endings = [question[start + 4 : stop] for start, stop in zip(places, places[1:], strict=False)]
        rows.append({"ind": 1, "ctx": context, "endings": endings, "label": "ABCD".index(letter), "split": "val"})
    rows.append({"ctx": "a", "endings": ["b", "", "c", "d"], "label": 0})
    rows.append({"ctx": "a", "endings": ["b", "e", "c", "d"], "label": ""})
    write_lines(tmp_path / "hs" / "hellaswag_val.jsonl", rows)
    result = prepare(tmp_path / "hs_out", tmp_path / "hs", "--dataset=hellaswag")
    assert records(tmp_path / "hs_out" / "dev.jsonl") == records(shared_dir / "data" / "hellaswag_test.jsonl")
    assert result["dropped"] == {"blank ending": 1, "no label": 1}


def test_rotten_tomatoes_in_a_tar(shared_dir, tmp_path):
    train, test = (contents(published(shared_dir, f"rotten_tomatoes_{split}.jsonl")) for split in ("train", "test"))
    archive = tmp_path / "rt-polaritydata.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for ending, label in (("pos", "Good"), ("neg", "Bad")):
            parts = [[text for text, found in split if found == label] for split in (train, test)]
            lines = [*parts[0], *(f"held out {i}" for i in range(533)), *parts[1]]
            data = "".join(line + " \n" for line in lines).encode("latin-1")
            info = tarfile.TarInfo(f"rt-polaritydata/rt-polarity.{ending}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    result = prepare(tmp_path / "out", archive, "--dataset=rotten_tomatoes")
    for split in ("train", "test"):
        made = (tmp_path / "out" / f"{split}.jsonl").read_bytes()
        assert made == (shared_dir / "data" / f"rotten_tomatoes_{split}.jsonl").read_bytes()
    assert result["splits"] == {"train": 8530, "dev": 1066, "test": 1066}


def test_yelp_of_both_kinds(tmp_path):
    text = '"2","Good \\""pizza\\"".\\nWe come back, often"\n"1","  "\n"1","Cold"\n'
    for kind in ("polarity", "full"):
        directory = tmp_path / f"yelp_review_{kind}_csv"
        directory.mkdir()
        (directory / "test.csv").write_text(text)
        result = prepare(tmp_path / kind, directory, "--dataset=yelp")
        assert result["dropped"] == {"blank question": 1}
    first, second = records(tmp_path / "polarity" / "test.jsonl")
    assert first.messages[1].content == 'Good "pizza".\nWe come back, often' and first.messages[2].content == "Good"
    assert second.messages[2].content == "Bad"
    assert [r.messages[2].content for r in records(tmp_path / "full" / "test.jsonl")] == ["2 stars", "1 star"]
    with tarfile.open(tmp_path / "yelp_review_full_csv.tgz", "w:gz") as archive:
        archive.add(tmp_path / "yelp_review_full_csv" / "test.csv", "yelp_review_full_csv/test.csv")
    prepare(tmp_path / "archive", tmp_path / "yelp_review_full_csv.tgz", "--dataset=yelp")
    made = [(tmp_path / name / "test.jsonl").read_bytes() for name in ("archive", "full")]
    assert made[0] == made[1]
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(UserError, match="must say `polarity` or `full`"):
        prepare(tmp_path / "none", tmp_path / "test.csv", "--dataset=yelp")
    (tmp_path / "yelp_review_full_csv" / "test.csv").write_text('"1","a"\n"6","b"\n')
    with pytest.raises(UserError, match=r"test.csv:2: a row is"):
        prepare(tmp_path / "full", tmp_path / "yelp_review_full_csv", "--dataset=yelp")
    assert len(records(tmp_path / "full" / "test.jsonl")) == 2, "what was there stays"


def test_paraphrases_of_three_files(tmp_path):
    paws = tmp_path / "final"
    paws.mkdir()
    (paws / "train.tsv").write_text('id\tsentence1\tsentence2\tlabel\n1\ta "b\tb " a\t1\n2\ta\tc\t0\n3\tx\tx\t1\n')
    result = prepare(tmp_path / "paws", paws, "--dataset=paraphrase")
    assert json.loads((tmp_path / "paws" / "train.jsonl").read_text()) == {"group": ['a "b', 'b " a']}
    assert result["dropped"] == {"no paraphrase": 1, "the same sentence twice": 1}
    quora = tmp_path / "quora_duplicate_questions.tsv"
    quora.write_text(
        '"id"\t"qid1"\t"qid2"\t"question1"\t"question2"\t"is_duplicate"\n'
        '"0"\t"1"\t"2"\t"How\nso?"\t"Why ""so""?"\t"1"\n'
    )
    prepare(tmp_path / "quora", quora, "--dataset=paraphrase")
    found = [json.loads(line) for path in (tmp_path / "quora").glob("*.jsonl") for line in path.open()]
    assert found == [{"group": ["How\nso?", 'Why "so"?']}]
    (paws / "train.tsv").write_text("id\tsentence1\tsentence2\tlabel\n1\ta\tb\t2\n")
    with pytest.raises(UserError, match=r"train.tsv:2: `label`='2'"):
        prepare(tmp_path / "paws", paws, "--dataset=paraphrase")


def gsm8k_file(path, text='{"question": "1+1?", "answer": "#### 2"}\n'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"question": "a", "answer": "b"}\n{"question"\n', r"test.jsonl:2: not JSON at column 12"),
        ('{"question": "a"}\n', r"test.jsonl:1: no `answer`, only question"),
        ('{"question": "a", "answer": 5}\n', r"test.jsonl:1: `answer` is int"),
        ("[1]\n", r"test.jsonl:1: an object with `question` belongs here, not list"),
        (b'{"question": "\xff", "answer": "b"}\n', r"test.jsonl:1: not UTF-8 at byte 14"),
        ("", r"no record is left of it \(it has no rows\)"),
        ('{"question": " ", "answer": "b"}\n', r"no record is left of it \(1 × blank question\)"),
    ],
)
def test_wrong_rows_are_named(tmp_path, text, match):
    with pytest.raises(UserError, match=match):
        prepare(tmp_path / "out", gsm8k_file(tmp_path / "test.jsonl", text), "--dataset=gsm8k")
    assert list((tmp_path / "out").iterdir()) == []


def test_checksums(tmp_path, caplog):
    file = gsm8k_file(tmp_path / "in" / "test.jsonl")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    prepare(tmp_path / "out", file, "--dataset=gsm8k", f"--sha256={found.upper()}")
    assert "is not what https://" in caplog.text
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"] == [{"file": str(file), "bytes": 41, "sha256": found, "original": ""}]
    with pytest.raises(UserError, match=f"has the sha256 {found}, not 0000"):
        prepare(tmp_path / "out", file, "--dataset=gsm8k", f"--sha256={'0' * 64}")
    with pytest.raises(UserError, match="is no sha256"):
        prepare(tmp_path / "out", file, "--dataset=gsm8k", "--sha256=abc")
    gsm8k_file(file.parent / "train.jsonl")
    with pytest.raises(UserError, match="has 2 that are read"):
        prepare(tmp_path / "out", file.parent, "--dataset=gsm8k", f"--sha256={found}")


def test_fetched_files_must_be_the_recorded_ones(tmp_path, monkeypatch):
    """What comes from an address is compared; the network itself is not part of this test."""
    original = known()["gsm8k"].originals[1]
    monkeypatch.setattr(download, "_copy", lambda url, target: gsm8k_file(target))
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    with pytest.raises(UserError, match=f"not {original.sha256} fetched from {original.url}; remove it"):
        prepare(tmp_path / "out", original.url, "--dataset=gsm8k", cache)
    with pytest.raises(UserError, match="not a https address"):
        prepare(tmp_path / "out", "http://example.org/test.jsonl", "--dataset=gsm8k", cache)


class Handler(http.server.BaseHTTPRequestHandler):
    """A file, one cut short, one that is not there, and one that has moved to http."""

    data = b'{"question": "1+1?", "answer": "#### 2"}\n' * 3

    def do_GET(self):
        codes = {"/gone/test.jsonl": 404, "/moved/test.jsonl": 302}
        self.send_response(codes.get(self.path, 200))
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("Location", "http://localhost:1/test.jsonl")
        self.end_headers()
        self.wfile.write(self.data[:40] if self.path == "/cut/test.jsonl" else self.data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a https server here, whose certificate is trusted."""
    if shutil.which("openssl") is None:
        pytest.skip("a certificate for the server needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"https://localhost:{running.server_port}"
        running.shutdown()


def test_files_are_fetched_once_and_whole(tmp_path, server, monkeypatch):
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"

    def fetch(path):
        return prepare(tmp_path / "out", f"{server}{path}/test.jsonl", "--dataset=gsm8k", cache)

    result = fetch("")
    assert result["splits"] == {"test": 3} and result["sources"][0]["file"] == f"{server}/test.jsonl"
    with pytest.raises(TryAgainError, match="40 of 123 bytes came"):
        fetch("/cut")
    with pytest.raises(UserError, match="the server says 404"):
        fetch("/gone")
    with pytest.raises(UserError, match="leads to http://localhost:1/test.jsonl, which is not https"):
        fetch("/moved")
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.name for path in kept] == ["test.jsonl"]
    monkeypatch.setattr(Handler, "data", b"")
    assert fetch("")["splits"] == {"test": 3}, "from the cache"


def test_damaged_and_dangerous_archives(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../test.jsonl", "{}")
    with pytest.raises(UserError, match="leads outside the archive"):
        prepare(tmp_path / "out", archive, "--dataset=gsm8k")
    packed = tmp_path / "test.jsonl.gz"
    data = gzip.compress(b'{"question": "1+1?", "answer": "#### 2"}\n' * 50)
    packed.write_bytes(data)
    assert prepare(tmp_path / "out", packed, "--dataset=gsm8k")["splits"] == {"test": 50}
    packed.write_bytes(data[:-12])
    with pytest.raises(UserError, match="test.jsonl.gz: cannot be read"):
        prepare(tmp_path / "out", packed, "--dataset=gsm8k")
    (tmp_path / "b.tar.gz").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="b.tar.gz: cannot be read"):
        prepare(tmp_path / "out", tmp_path / "b.tar.gz", "--dataset=gsm8k")


def test_wrong_commands(tmp_path):
    file = gsm8k_file(tmp_path / "a" / "test.jsonl")
    gsm8k_file(tmp_path / "b" / "test.jsonl")
    for arguments, match in (
        (["--dataset=gsm"], "is not known; use one of gsm8k, hellaswag"),
        ([], "pass one of --dataset=NAME"),
        (["--dataset=gsm8k", "--columns=document=a"], "pass only one of"),
        (["--dataset=spider"], "has none of the files of spider: train_spider.json"),
    ):
        with pytest.raises(UserError, match=match):
            prepare(tmp_path / "out", file, *arguments)
    with pytest.raises(UserError, match="2 files are named test.jsonl"):
        prepare(tmp_path / "out", tmp_path, "--dataset=gsm8k")
    with pytest.raises(UserError, match="no such file or directory"):
        prepare(tmp_path / "out", tmp_path / "c", "--dataset=gsm8k")
    with pytest.raises(UserError, match="is not empty, and nothing prepared"):
        prepare(file.parent, file, "--dataset=gsm8k")
    prepare(tmp_path / "out", file, "--dataset=gsm8k")
    with pytest.raises(UserError, match="holds gsm8k, not columns document=question"):
        prepare(tmp_path / "out", file, "--columns=document=question")
    with pytest.raises(UserError, match="belongs to --mode=prepare, not to inspect"):
        run(["main", "--mode=inspect", "--dataset=gsm8k"])
    with pytest.raises(UserError, match="pass --source=PATH"):
        run(["main", "--mode=prepare", "--dataset=nl_rx", f"--out={tmp_path / 'new'}"])
