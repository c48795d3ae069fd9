# SPDX-License-Identifier: Apache-2.0
"""`--mode=analyze` on a trained run, one of its checkpoints and its export; what it says to wrong input; its page."""

import gc
import json
import re
import weakref

import jax
import numpy as np
import pytest

import llm_jepa_jax as lj
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import main, run
from llm_jepa_jax.named_models import Model, find_models
from tests.browser import needs_chromium, opened
from tests.test_initial import QUICK

LINES = [(f"lines with {n} words", f"[a-z]{{{n}}}") for n in range(29)] + [("lines", ".* " * 3000)]
"""The last one's code is too long for the model, its text can be asked."""


def analyze(*flags):
    return run(["main", "--mode=analyze", *flags])


def write_lines(path, lines):
    path.write_text("".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in lines))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two checkpoints, its export, and records that it was not trained on."""
    place = tmp_path_factory.mktemp("analyzed")
    run([*QUICK, f"--workdir={place}/run", "--config.checkpoint.every_steps=1"])
    lj.load(place / "run").save_hf(place / "exported")
    write_lines(place / "records.jsonl", LINES)
    return place


@pytest.fixture
def one_at_a_time(monkeypatch):
    """Opening a model fails where weights of another are still held; gives how many there were of all."""
    held, original = [], Model.open

    def opened(model):
        gc.collect()
        assert all(reference() is None or reference().is_deleted() for reference in held)
        found = original(model)
        held.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(found.params))
        return found

    monkeypatch.setattr(Model, "open", opened)
    return held


def test_a_runs_first_checkpoint_and_the_export_of_its_last(trained, one_at_a_time):
    """The same pairs through both, in both readings; one record is too long; both are asked now."""
    out = trained / "out"
    models = [f"--models=first={trained}/run/checkpoints/1", f"--models=HF={trained}/exported"]
    result = analyze(*models, f"--data={trained}/records.jsonl", f"--out={out}", "--examples=24", "--answers")
    assert len(one_at_a_time) > 20
    numbers = json.loads((out / "analysis.json").read_text())
    assert result["pairs"] == 23 == len(numbers["data"]["records"]) and numbers["data"]["different_texts"] == 23
    assert [numbers["models"][name]["step"] for name in ("first", "HF")] == [1, None]
    arrays = dict(np.load(out / "embeddings.npz"))
    chosen = [LINES[int(where.rpartition(":")[2]) - 1] for where in numbers["data"]["records"]]
    model = lj.load(trained / "run")
    for reading, k in (("Enc", 0), ("Pred", None)):  # the export says how it was trained
        text = model.encode([text for text, _ in chosen], num_predictors=k)
        code = model.encode([code for _, code in chosen], role="assistant")
        np.testing.assert_allclose(arrays[f"HF/{reading}/text_PxD"], text, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(arrays[f"HF/{reading}/code_PxD"], code, rtol=1e-4, atol=1e-4)
        assert np.abs(arrays[f"first/{reading}/text_PxD"] - text).max() > 1e-3
    found = numbers["models"]["first"]["readings"]["Enc"]
    spectrum = np.linalg.svd(arrays["first/Enc/text_PxD"] - arrays["first/Enc/code_PxD"], compute_uv=False)
    np.testing.assert_allclose(found["singular_values"], spectrum, rtol=1e-4)
    too_long, few = numbers["notes"]
    assert too_long == "1 of 24 pairs are longer than a model's max_positions and left out."
    assert found["linear_map"]["too_few_pairs"] and "fewer than twice the width of first, HF" in few
    [change] = numbers["changes"]
    assert (change["first"], change["second"], change["asked"], change["skipped"]) == ("first", "HF", 24, 0)
    lines = [json.loads(line) for line in (out / "changes-first-HF.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and set(lines[0]["answers"]) == {"first", "HF"}
    page = (out / "analysis.html").read_text()
    plots = {path.stem for path in (out / "plots").glob("*.png")}
    assert page.count("data:image/png;base64,") == len(plots) == 7 and "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "Fixed and broken: first → HF" in page


def copied(run, target, **facts):
    """The same run with other facts about its records."""
    target.mkdir()
    for path in run.iterdir():
        (target / path.name).symlink_to(path)
    (target / "run.json").unlink()
    (target / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | facts))
    return target


def test_runs_that_held_out_other_records_need_a_file(trained, tmp_path):
    other = copied(trained / "run", tmp_path / "other", eval_hash="0")
    with pytest.raises(UserError, match="other was evaluated on other records than run.*pass --data=FILE.jsonl"):
        analyze(f"--models={trained}/run", f"--models={other}", f"--out={tmp_path}/out")


@pytest.mark.slow
def test_without_data_the_runs_own_records_and_answers_are_taken(trained, tmp_path):
    facts = json.loads((trained / "run" / "run.json").read_text())
    copied(trained / "run", tmp_path / "copy", train_hash=facts["eval_hash"])
    (tmp_path / "foreign").mkdir()  # as others publish models: nothing says how it was trained
    for path in (trained / "exported").iterdir():
        if path.name != "training_config.json":
            (tmp_path / "foreign" / path.name).symlink_to(path)
    models = [f"--models=a={trained}/run", f"--models=b={tmp_path}/copy", f"--models=c={tmp_path}/foreign"]
    result = analyze(*models, f"--out={tmp_path}/out", "--examples=12")
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert numbers["data"]["records"][0] == "synthetic:eval:1"
    assert result["models"]["a/Enc"] == result["models"]["b/Enc"]
    assert "c/Pred" not in result["models"] and "a/Pred" in result["models"]
    assert result["models"]["c/Enc"] == pytest.approx(result["models"]["a/Enc"], rel=1e-4)
    [change] = result["changes"]
    assert (change["asked"], change["fixed"], change["broken"], change["mcnemar_p"]) == (2, 0, 0, 1.0)
    assert "b was trained on these very records: its numbers are not those of new ones." in numbers["notes"]
    [left_out] = [note for note in numbers["notes"] if "left out" in note]
    assert "from b to c is left out: c is a published model, which holds no answers; pass --answers" in left_out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out=OUT"], "nothing to look at; pass --models=NAME=DIR"),
        (["--models=RUN"], "nowhere to write; pass --out=DIR"),
        (["--models=RUN", "--out=RUN"], "holds a run or a model; name a directory of its own"),
        (["--models=RUN", "--out=DATA"], "cannot be made (File exists); name another directory"),
        (["--models=RUN", "--models=RUN", "--out=OUT"], "two are called run; name one, as in"),
        (["--models=x=DIR", "--out=OUT"], "has no config.json; name a run's directory"),
        (["--models=RUN/checkpoints/7", "--out=OUT"], "no whole checkpoint of step 7; there are 1, 2"),
        (["--models=HF", "--out=OUT"], "have no records of their own; pass --data=FILE.jsonl"),
        (["--models=RUN", "--out=OUT", "--data=DIR/no.jsonl"], "name a JSONL file"),
        (["--models=RUN", "--out=OUT", "--data=FEW"], "give at least 10 pairs of several texts"),
        (["--models=RUN", "--out=OUT", "--data=SAME"], "with 1 different texts, in 30 records"),
        (["--models=RUN", "--out=OUT", "--task=perplexity"], "name one task whose answers are right or wrong"),
        (["--models=RUN", "--out=OUT", "--task=exact"], "names 'exact'; use some of"),
        (["--models=RUN", "--out=OUT", "--examples=5"], "--examples"),
        (["--models=RUN", "--out=OUT", "--workdir=RUN"], "takes no --workdir; pass --models="),
        (["--models=RUN", "--out=OUT", "--config=configs/tiny.py"], "takes no --config; the models say what they are"),
        (["--models=RUN", "--out=OUT", "--prompt=x"], "--prompt belongs to --mode=generate"),
    ],
)
def test_wrong_input_is_one_line_with_the_fix(trained, tmp_path, flags, words):
    write_lines(tmp_path / "few.jsonl", LINES[:5])
    write_lines(tmp_path / "same.jsonl", [("one text", code) for _, code in LINES])
    names = {
        "RUN": trained / "run", "OUT": tmp_path / "out", "HF": trained / "exported", "FEW": tmp_path / "few.jsonl",
        "SAME": tmp_path / "same.jsonl", "DATA": trained / "records.jsonl", "DIR": tmp_path,
    }  # fmt: skip
    flags = [re.sub("|".join(names), lambda found: str(names[found[0]]), flag) for flag in flags]
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        analyze(*flags)
    assert "\n" not in str(caught.value)


def test_umap_that_is_not_installed_is_one_line(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--umap: needs umap-learn, which is not installed"):
        analyze(f"--models={trained}/run", f"--out={tmp_path}", "--umap")


def test_names_of_models(trained, tmp_path, monkeypatch):
    (tmp_path / "seed=82").symlink_to(trained / "run")
    monkeypatch.chdir(tmp_path)
    given = [f"a b={trained}/run", "seed=82", "./seed=82/checkpoints/1", f"{trained}/exported"]
    assert [(m.name, m.step) for m in find_models(given)] == [
        ("a b", None), ("run", None), ("run@1", 1), ("exported", None)
    ]  # fmt: skip


@pytest.mark.slow
@needs_chromium
def test_the_pages_render_without_errors_and_without_the_network(tmp_path, monkeypatch, capsys):
    """The report that training writes, and the analysis of that run."""
    workdir = tmp_path / "run"
    run([*QUICK, "--config.log.report=True", f"--workdir={workdir}"])
    command = ["main", "--mode=analyze", f"--models={workdir}", "--examples=40", f"--out={tmp_path}/out"]
    monkeypatch.setattr("sys.argv", command)
    main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["report"]
    assert report == f"{tmp_path}/out/analysis.html"
    for page in (workdir / "report.html", tmp_path / "out" / "analysis.html"):
        assert opened(page, tmp_path / "seen") == ([], []), page
