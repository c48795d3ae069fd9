# SPDX-License-Identifier: Apache-2.0
"""The real command line, each capability once, and what it says to wrong input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import llm_jepa_jax
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import parse, run
from tests.conftest import CACHE, REPOSITORY

TIMEOUT = 900
SMOKE = "--config=configs/tiny.py:smoke"
ALWAYS_LOGGED = (
    "ntp_loss", "jepa_loss", "total_loss", "cos_pair", "cos_shuffled", "rank_text", "rank_code", "std_text", "std_code",
    "grad_norm", "learning_rate", "tokens_per_s", "examples_per_s", "target_tokens", "pairs", "padding_share",
    "data_wait_share", "skipped_steps",
)  # fmt: skip


def command(*arguments):
    return [sys.executable, "-m", "llm_jepa_jax.main", *arguments]


def environment(devices=1):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(*arguments, devices=1, report=False):
    """A process; without a report, which takes longer than such a run."""
    common = [
        f"--config.train.compile_cache={CACHE}", "--config.log.tensorboard=False", f"--config.log.report={report}",
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*arguments, *common), cwd=REPOSITORY, env=environment(devices), **pipes)


def finish(process):
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, out, err


def result_of(process):
    code, out, err = finish(process)
    assert code == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [pytest.param(1, [], marks=pytest.mark.slow), (8, ["--config.mesh.fsdp=4", "--config.mesh.tensor=2"])],
)
def test_the_8b_preset_trains_as_a_miniature(tmp_path, devices, mesh):
    workdir = tmp_path / "run"
    arguments = ["--config=configs/llama8b.py:smoke", f"--workdir={workdir}", *mesh]
    result = result_of(start(*arguments, devices=devices, report=devices == 1))
    assert result["step"] == 4 and 0 < result["ntp_loss"] < 7 and 0 < result["jepa_loss"] < 2
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    for name in ALWAYS_LOGGED:
        assert any(name in line for line in lines), name
    report = ("report.html", "plots/losses.png", "analysis.npz") if devices == 1 else ()
    for name in ("config.json", "tokenizer.model", "eval/exact_match-4.jsonl", *report):
        assert (workdir / name).exists(), name
    assert json.loads((workdir / "config.json").read_text())["train"]["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    result = result_of(start(SMOKE, f"--workdir={workdir}"))
    return workdir, result


def test_a_run_is_evaluated_generated_from_and_inspected_by_its_directory(trained, tmp_path, capsys, monkeypatch):
    workdir, result = trained
    monkeypatch.chdir(tmp_path)
    apart = ["--config.eval.tasks=exact_match,perplexity", f"--out={tmp_path / 'apart'}"]
    evaluation = run(["main", "--mode=eval", f"--workdir={workdir}", *apart])
    assert json.loads((tmp_path / "apart" / "result.json").read_text()) == evaluation
    assert (tmp_path / "apart" / "perplexity-4.jsonl").exists() and not (
        workdir / "eval" / "perplexity-4.jsonl"
    ).exists()
    assert json.loads((workdir / "result.json").read_text()) == result
    assert evaluation["exact_match"] == result["exact_match"] and evaluation["step"] == 4
    assert 1 < evaluation["perplexity_low"] < evaluation["perplexity"] < evaluation["perplexity_high"] < 512
    answers = run(["main", "--mode=generate", f"--workdir={workdir}", "--prompt=lines that lack a digit"])["answers"]
    model = llm_jepa_jax.load(workdir)
    assert answers == model.generate(["lines that lack a digit"])
    shown = run(["main", "--mode=inspect", f"--workdir={workdir}", "--rows=1"])
    assert shown["examples"] == 400 and "packing: 400 examples" in capsys.readouterr().out


def test_the_facade_agrees_with_itself(trained):
    model = llm_jepa_jax.load(trained[0])
    ids = [model.tokenizer.encode("lines that lack a digit"), model.tokenizer.encode("a")]
    hidden, logits = model.hidden(ids), model.logits(ids)
    assert [len(h) for h in hidden] == [len(i) for i in ids]
    embedding = np.asarray(model.run.params["embedding"])
    np.testing.assert_allclose(logits[1], hidden[1] @ embedding.T, rtol=1e-5, atol=1e-5)
    with_one, with_none = model.encode(["a digit"]), model.encode(["a digit"], num_predictors=0)
    code = model.encode(["[0-9]"], role="assistant")
    assert with_one.shape == code.shape == (1, 64) and not np.allclose(with_one, with_none, atol=1e-3)
    assert len(model.generate(["x"], max_new_tokens=3)) == 1
    for wrong in (lambda: model.hidden([[]]), lambda: model.hidden([[10**6]]), lambda: model.encode(["a"], 11)):
        with pytest.raises(UserError):
            wrong()
    with pytest.raises(UserError, match="has no config.json; a run directory holds"):
        llm_jepa_jax.load(trained[0] / "eval")


def wait_for_step(process, workdir, step):
    """Returns once the metrics show `step`."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        assert process.poll() is None, finish(process)
        path = workdir / "metrics.jsonl"
        if path.exists() and any(f'"step": {n},' in path.read_text() for n in range(step, step + 20)):
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get there")


def last_step(workdir):
    """The last step that the metrics show."""
    path = workdir / "metrics.jsonl"
    return max(map(int, re.findall(r'"step": (\d+),', path.read_text()))) if path.exists() else 0


def outcome(workdir):
    """Parameters, and every metrics line without what depends on the clock."""
    timed = ("tokens_per_s", "examples_per_s", "data_wait_share")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    params = llm_jepa_jax.load(workdir).run.params
    return params, [{k: v for k, v in line.items() if k not in timed} for line in lines]


def test_a_killed_and_stopped_run_ends_bit_equal_to_one_left_alone(tmp_path):
    """SIGKILL at a random step, the same command again, SIGTERM at a later one, and again; steps with pairs and steps
    without, spans and random directions drawn, a weight that rises, a linear predictor."""
    arguments = [
        SMOKE, "--config.train.num_steps=40", "--config.checkpoint.every_steps=7",
        "--config.log.every_steps=3", "--config.eval.every_steps=14",
        "--config.objective.jepa.dropout=0.5", "--config.objective.jepa.dropout_by=step",
        "--config.objective.stp.weight=0.1", "--config.objective.sigreg.weight=0.01",
        "--config.objective.jepa.linear_predictor=True", "--config.objective.jepa.schedule=linear",
    ]  # fmt: skip
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    result_of(start(*arguments, f"--workdir={alone}"))
    params, lines = outcome(alone)
    steps = [(line["step"], "exact_match" in line) for line in lines]
    assert len(steps) == len(set(steps)) and (40, True) in steps and (14, True) in steps
    draw = np.random.default_rng()
    for sign, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 0)):
        step = last_step(workdir) + int(draw.integers(3, 14))  # beyond what an earlier start has written
        process = start(*arguments, f"--workdir={workdir}")
        wait_for_step(process, workdir, step)
        process.send_signal(sign)
        returned, _, err = finish(process)
        assert returned == code, err[-2000:]
    assert "the same command goes on from there" in err
    assert result_of(start(*arguments, f"--workdir={workdir}"))["step"] == 40
    other_params, other_lines = outcome(workdir)
    assert other_lines == lines
    for a, b in zip(jax_leaves(params), jax_leaves(other_params), strict=True):
        np.testing.assert_array_equal(a, b)


def jax_leaves(tree):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("asks", [False, True], ids=["plain text", "groups and plain text"])
def test_any_corpus_trains_and_is_evaluated_where_it_can_be(tmp_path, monkeypatch, capsys, caplog, asks):
    monkeypatch.chdir(REPOSITORY)
    caplog.set_level("INFO")
    lines = [{"text": f"It is number {i}. What comes next? It is {i + 1}."} for i in range(20 if asks else 40)]
    groups = [{"group": [f"{i} plus one", f"one more than {i}", f"what follows {i}"]} for i in range(40)]
    files = [tmp_path / f"{name}.jsonl" for name in ("train", "eval")]
    for path, records in zip(files, (lines + groups if asks else lines, lines[:4] + groups[:4] * asks), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = [
        SMOKE, f"--workdir={tmp_path}/run", *(f"--config.data.{path.stem}={path}" for path in files),
        "--config.train.num_steps=2", "--config.data.layout=shared", "--config.data.text_views=sentence",
        "--config.text.vocab_size=320", "--config.mesh.data=8", f"--config.log.report={not asks}",
        "--config.log.tensorboard=False", "--config.eval.final_examples=6", "--config.eval.max_new_tokens=2",
    ]  # fmt: skip
    result = run(["main", *arguments])
    assert result["step"] == 2 and result["jepa_loss"] > 0 and ("exact_match" in result) == asks
    words = (
        "4 of 12 records are plain text" if asks else "no evaluation record has a conversation: exact_match is skipped"
    )
    assert words in caplog.text and (tmp_path / "run" / "report.html").exists() == (not asks)
    assert not (tmp_path / "run" / "analysis.npz").exists(), "plain text has no conversations to embed"
    assert ("exact_match" in run(["main", "--mode=eval", f"--workdir={tmp_path}/run"])) == asks
    capsys.readouterr()
    run(["main", "--mode=inspect", f"--workdir={tmp_path}/run", "--rows=9"])
    assert "plain text" in capsys.readouterr().out.split("pair end")[1]


def test_a_finished_run_started_again_changes_nothing(trained):
    workdir, result = trained
    before = (workdir / "metrics.jsonl").read_text()
    again = result_of(start(SMOKE, f"--workdir={workdir}"))
    assert again["exact_match"] == result["exact_match"] and (workdir / "metrics.jsonl").read_text() == before


def test_a_run_goes_on_from_its_own_config_json_on_another_mesh(trained, tmp_path):
    """The resolved configuration is a valid `--config`, and a checkpoint of 1 device restores on 8."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    arguments = [f"--config={workdir}/config.json", "--config.train.num_steps=6", f"--workdir={workdir}"]
    mesh = [f"--config.mesh.{axis}=2" for axis in ("slices", "fsdp", "context")]
    assert llm_jepa_jax.load(workdir).run.step == 4 and run(["main", *arguments, *mesh])["step"] == 6


def test_non_finite_updates_stop_the_run_with_a_saved_state(tmp_path):
    workdir = tmp_path / "run"
    arguments = [SMOKE, f"--workdir={workdir}", "--config.train.num_steps=30"]
    process = start(*arguments, "--config.model.init_std=1e30", "--config.train.max_skipped=3")
    code, _, err = finish(process)
    assert code == 2 and "3 updates in a row were not finite, the last at step 3" in err
    assert err.splitlines()[-1].startswith("error: training stopped") and "the state is saved at step" in err
    assert any(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/none.py"], "--config=configs/none.py: no such file"),
        (["--config=configs/tiny.py:huge"], "presets take `:smoke` or nothing, not `:huge`"),
        (
            [SMOKE, "--config.opt.learning_rat=1"],
            "--config.opt.learning_rat: unknown key `learning_rat`; did you mean learning_r",
        ),
        ([SMOKE, "--config.seed.x=1"], "--config.seed.x: there are no keys below a value"),
        ([SMOKE, "--config.opt.learning_rate=fast"], "learning_rate"),
        ([SMOKE, "--config.data.layout=shard"], "`data.layout`='shard'; use one of separate, shared, padded"),
        ([SMOKE, "--config.mesh.fsdp=3"], "`mesh.fsdp`=3 does not divide 8 devices; use 1, 2, 4, 8, or -1 to fill"),
        ([SMOKE, "--config.mesh.data=2"], "leaves 6 of 8 devices idle"),
        ([SMOKE, "--config.mesh.tensor=4", "--config.mesh.data=2"], "does not divide `model.num_kv_heads`=2"),
        ([SMOKE, "--config.data.rows_per_step=12"], "use a multiple of 8, such as 16"),
        ([SMOKE, "--config.data.train=none.jsonl"], "none.jsonl: No such file or directory"),
        (
            [SMOKE, "--config.objective.ntp.weight=0", "--config.objective.vicreg.weight=0"],
            "lets the embeddings collapse",
        ),
        ([SMOKE, "--config.objective.jepa.num_predictors=11"], "use 0 to 10"),
        ([SMOKE, "--config.data.row_buckets=4"], "`data.row_buckets`=4 halves `data.row_length`=256"),
        ([SMOKE, "--config.objective.jepa.dropout_by=row"], "use one of example, step"),
        (
            [SMOKE, "--config.data.layout=shared", "--config.objective.jepa.placement=prepend"],
            "use data.layout=separate",
        ),
        ([SMOKE, "--config.objective.jepa.dropout=1.5"], "must lie between 0 and 1"),
        ([SMOKE, "--config.model.num_kv_heads=3"], "does not divide `model.num_heads`=4"),
        ([SMOKE, "--config.model.vocab_size=100"], "is below the 512 pieces of the tokenizer"),
        ([SMOKE, "--config.train.num_steps=0"], "leave nothing to do"),
        ([SMOKE, "--config.objective.vicreg.weight=1", "--config.objective.jepa.weight=0"], "has no views"),
        ([SMOKE, "--config.eval.tasks=exact"], "`eval.tasks`='exact' names 'exact'; use some of exact_match, gsm8k"),
        ([SMOKE, "--config.eval.tasks=gsm8k"], "can ask none of 16 records (the target has no number behind ####"),
        ([SMOKE, "--config.eval.tasks=spider"], "`eval.databases` is empty"),
        ([SMOKE, "--config.eval.sql_seconds=0"], "eval.sql_seconds"),
        (
            [SMOKE, "--config.checkpoint.ahead_steps=9", "--config.checkpoint.every_steps=9"],
            "`checkpoint.ahead_steps`=9 is not below `checkpoint.every_steps`=9",
        ),
        ([SMOKE, "--mode=fly"], "--mode"),
        ([SMOKE, "--colour=red"], "colour"),
        ([SMOKE, "stray"], "unexpected 'stray'"),
        (["--mode=eval", "--workdir=/nowhere"], "--workdir=/nowhere: holds no run"),
        ([SMOKE, "--workdir=/proc/none"], "cannot write there"),
    ],
)
def test_wrong_input_is_one_line_with_the_fix(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    if not any(a.startswith("--workdir") for a in arguments):
        arguments = [*arguments, f"--workdir={tmp_path}/run"]
    with pytest.raises(UserError) as caught:
        run(["main", *arguments])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_input_ends_with_code_2_and_no_stack_trace(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "code": "b"}\n{"text": "a" "code": "b"}\n')
    arguments = [f"--config.data.train={tmp_path}/a.jsonl", f"--config.data.eval={tmp_path}/a.jsonl"]
    code, out, err = finish(start(SMOKE, *arguments, f"--workdir={tmp_path}/run"))
    assert code == 2 and out == ""
    assert err.splitlines()[-1].startswith(f"error: {tmp_path}/a.jsonl:2: not JSON at column 14")
    assert "Traceback" not in err


def test_a_refused_start_leaves_the_directory_free(tmp_path, monkeypatch):
    """The fix that the message names works in the same directory."""
    monkeypatch.chdir(REPOSITORY)
    workdir = tmp_path / "run"
    small = [SMOKE, f"--workdir={workdir}", "--config.log.report=False", "--config.mesh.data=8"]
    with pytest.raises(UserError, match="records do not fit data.row_length=24"):
        run(["main", *small, "--config.data.row_length=24"])
    assert not (workdir / "config.json").exists()
    assert run(["main", *small, "--config.train.num_steps=1", "--config.eval.final_examples=1"])["step"] == 1


def test_a_changed_key_or_file_does_not_overwrite_a_run(trained, tmp_path, monkeypatch):
    workdir, _ = trained
    monkeypatch.chdir(REPOSITORY)
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match="holds a run with `model.mlp_dim`=128, not 64"):
        run(["main", SMOKE, "--config.model.mlp_dim=64", f"--workdir={workdir}"])
    assert (workdir / "config.json").read_text() == before


def test_no_room_on_the_disk_is_one_line(trained, tmp_path):
    """A limit on file size stands for a full disk: the last checkpoint before it stays valid."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    line = " ".join(command(SMOKE, f"--workdir={workdir}", "--config.train.num_steps=8", "--config.log.report=False"))
    line += " --config.checkpoint.retry_seconds=0 --config.train.compile_cache= --config.log.tensorboard=False"
    line = f"ulimit -f 100; exec {line}"
    no_cache = environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # it would not take what is larger
    process = subprocess.run(
        ["bash", "-c", line], cwd=REPOSITORY, env=no_cache, capture_output=True, text=True, timeout=TIMEOUT
    )
    last = process.stderr.splitlines()[-1]
    assert process.returncode == 2 and last.startswith("error: ") and "cannot write a checkpoint" in last, last
    assert "Traceback" not in process.stderr and "Error" not in process.stderr, process.stderr[-2000:]
    assert llm_jepa_jax.load(workdir).run.step == 4


@pytest.mark.parametrize(
    ("config", "name"),
    [("configs/tiny.py", "tiny"), ("configs/llama8b.py:smoke", "llama8b-smoke"), ("runs/mine/config.json", "mine")],
)
def test_runs_are_named_after_their_configuration(config, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    assert parse(["main", f"--config={config}"]).workdir == f"runs/{name}"
