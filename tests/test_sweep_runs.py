# SPDX-License-Identifier: Apache-2.0
"""Sweeps of real runs of seconds, each a process of the real command line."""

import csv
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.sweep.sweep import run
from tests.browser import needs_chromium, opened
from tests.conftest import REPOSITORY
from tests.faults.runs import last_step, wait
from tests.sweeps import NTP, TINY, environment, write_records

K = "objective.jepa.num_predictors"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """One point that is done, and one that cannot be: (directory, flags, last line)."""
    directory = tmp_path_factory.mktemp("swept") / "sweep"
    flags = [f"--dir={directory}", *TINY, f"--grid={K}=1,11", "--seeds=82", "--config.train.num_steps=10"]
    return directory, flags, run(flags)


def test_a_failing_point_is_shown_and_the_others_go_on(swept):
    directory, _, last = swept
    assert (last["points"], last["done"], last["failed"], last["left"]) == (2, 1, 1, 0)
    table = (directory / "table.md").read_text()
    assert re.search(r"^\| \*\*k 1\*\* \| \*\*1\*\* \| \*\*10\*\* \| \*\*[\d.]+ [MG]FLOP\*\* \|", table, re.MULTILINE)
    assert "| num_predictors=11_seed=82 | error: config: `objective.jepa.num_predictors`=11 is out of range" in table
    [done, failed] = csv.DictReader((directory / "table.csv").open())
    assert float(done["dev_mean"]) > 1 and float(done["flops"]) > 1e6
    assert failed["failed"] == "1" and failed["dev_mean"] == ""
    point = directory / "points" / "num_predictors=1_seed=82"
    assert json.loads((point / "result.json").read_text())["perplexity"] == float(done["dev_mean"])
    assert "error: config" in (directory / "failures" / "num_predictors=11_seed=82.json").read_text()


def test_what_is_done_is_not_run_again_and_another_configuration_is_refused(swept, tmp_path):
    before, flags, _ = swept
    directory = tmp_path / "sweep"
    shutil.copytree(before, directory)
    flags = [f"--dir={directory}", *flags[1:]]
    log = directory / "logs" / "num_predictors=1_seed=82.log"
    size = log.stat().st_size
    assert run([f"--dir={directory}", "--only=num_predictors=1_seed=82"])["done"] == 1  # the directory knows its sweep
    assert log.stat().st_size == size
    with pytest.raises(
        UserError, match=r"another configuration \(opt.weight_decay was 0.1, now 0.2\); name another --dir"
    ):
        run([*flags, "--config.opt.weight_decay=0.2"])
    assert run([*flags, "--config.log.every_steps=1", "--table"])["done"] == 1  # changes no result
    flags = [flag.replace("=1,11", "=1,2") for flag in flags]
    assert run([*flags, "--table"]) | {"report": ""} == {"points": 2, "done": 1, "failed": 0, "left": 1, "report": ""}


def start(directory, *flags):
    log = directory.with_suffix(".log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "llm_jepa_jax.sweep", f"--dir={directory}", *flags],
        cwd=REPOSITORY, env=environment(), stdout=log, stderr=log,
    )  # fmt: skip


def runs_of(directory):
    """Process ids of its points."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if f"--workdir={directory}/points/".encode() in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_signal_ends_the_runs_and_the_same_command_goes_on(tmp_path):
    directory = tmp_path / "sweep"
    flags = [*TINY, f"--grid={K}=0,1", "--seeds=82", "--jobs=2", "--config.train.num_steps=3000"]
    process = start(directory, *flags)
    wait(lambda: sum(last_step(point) > 0 for point in directory.glob("points/*")) == 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 1 and runs_of(directory) == []
    assert '"left": 2' in directory.with_suffix(".log").read_text()
    assert list(directory.glob("points/*/checkpoints/*"))  # they saved before they ended


@pytest.mark.slow
def test_equal_compute_and_the_tuner_share_points_with_the_grid(tmp_path):
    directory = tmp_path / "sweep"
    flags = [f"--dir={directory}", *TINY, f"--grid={K}=0..2", "--grid=objective.jepa.weight=0.5,2", "--seeds=82,23"]
    flags += [
        f"--baseline={NTP}",
        "--variant=JEPA: objective.jepa.dropout=0",
        "--config.data.layout=shared",
        "--jobs=2",
    ]
    flags += ["--config.train.num_steps=30", f"--test={write_records(tmp_path / 'test.jsonl')}"]
    tuned = run([*flags, "--tune"])
    found = json.loads((directory / "tune.json").read_text())[0]
    assert found["runs"] <= 4 and tuned["done"] == found["runs"] + 2 and tuned["failed"] == 0
    logs = {path.name: path.stat().st_size for path in directory.glob("logs/*.log")}
    whole = run([*flags, "--equal-compute"])
    assert whole["done"] == 2 * 6 + 2 + 2 and whole["left"] == 0
    assert all((directory / "logs" / name).stat().st_size == size for name, size in logs.items())
    lines = list(csv.DictReader((directory / "table.csv").open()))
    [scaled] = [line for line in lines if line["budget"] == "equal compute"]
    assert float(scaled["flops"]) == pytest.approx(float(lines[0]["flops"]), rel=0.03) and float(scaled["steps"]) < 30
    assert all(0 < float(line["test_mean"]) != float(line["dev_mean"]) for line in lines)
    verdicts = directory / "points" / "NTP_seed=82" / "test" / "perplexity-30.jsonl"
    assert len(verdicts.read_text().splitlines()) == 6  # all records, though TINY's evaluation has four
    assert "the whole grid's best" in (directory / "table.md").read_text()


@pytest.mark.slow
@needs_chromium
def test_the_page_renders_without_errors_and_without_the_network(swept, tmp_path):
    """Its own policy lets a browser load nothing; what it tried would be an error on the console."""
    page = swept[0] / "sweep.html"
    assert opened(page, tmp_path / "page") == ([], [])
    for policy in (True, False):
        other = tmp_path / f"other-{policy}.html"
        text = page.read_text() if policy else page.read_text().replace("Content-Security-Policy", "none")
        other.write_text(text.replace("<h1>", '<img src="http://localhost/a.png"><h1>'))
        console, asked = opened(other, tmp_path / "other")
        assert (len(console), asked) == ((1, []) if policy else (0, ["http://localhost/a.png"]))
