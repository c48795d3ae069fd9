# SPDX-License-Identifier: Apache-2.0
"""Sweeps without a run: what they expand to, how they compare, what they print, how they tune."""

import csv
import io
import json
import math
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from llm_jepa_jax.config import freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.main import parse as parse_main
from llm_jepa_jax.resolve import resolve
from llm_jepa_jax.sweep import comparison, tables
from llm_jepa_jax.sweep.command_line import parse, read_spec
from llm_jepa_jax.sweep.comparison import Sample, make_rows, paired, scaled_cells
from llm_jepa_jax.sweep.devices import parse_devices
from llm_jepa_jax.sweep.page import write_page
from llm_jepa_jax.sweep.points import points
from llm_jepa_jax.sweep.results import Outcome, higher_is_better, metric_of
from llm_jepa_jax.sweep.spec import PAPER_SEEDS, from_mapping, load, parse_values
from llm_jepa_jax.sweep.submit import job_lines
from llm_jepa_jax.sweep.sweep import run
from llm_jepa_jax.sweep.tuner import tune
from tests.benchmarks.tuner import trial
from tests.conftest import REPOSITORY
from tests.sweeps import NTP, outcomes_of, spec_of

HOSTILE = "a b; touch 'owned' $(touch owned) `touch owned` \"&& \\ é\n#"
LAMBDA, K = "objective.jepa.weight", "objective.jepa.num_predictors"


def spec_from(*arguments):
    return read_spec(*parse(["--dir=none", *arguments]))


# --- What a sweep expands to


def test_values_are_lists_and_ranges():
    assert parse_values("0.5,1,2") == ["0.5", "1", "2"]
    assert parse_values("0..4,8") == ["0", "1", "2", "3", "4", "8"]
    assert parse_values("(2,4),'a,b'") == ["(2,4)", "a,b"]


def test_a_grid_is_every_combination_with_every_seed(tmp_path):
    spec = spec_from(
        f"--grid={LAMBDA}=0.5,1,2,4", f"--grid={K}=0..4", "--seeds=82,23", f"--baseline={NTP}", "--variant=JEPA:"
    )
    every = points(spec, tmp_path)
    assert len(every) == (4 * 5 + 1) * 2 and len({point.name for point in every}) == len(every)
    assert every[0].name == "NTP_seed=82" and every[1].name == "JEPA_weight=0.5_num_predictors=0_seed=82"
    assert every[1].configuration[LAMBDA] == 0.5 and every[0].configuration[LAMBDA] == 0.0
    # what main is given is what the point says
    values = parse_main(["main", *every[-1].arguments])
    assert values.config.objective.jepa.weight == 4.0 and values.config.seed == 23
    assert values.workdir == str(tmp_path / "points" / "JEPA_weight=4_num_predictors=4_seed=23")


def test_random_settings_are_the_same_ones_every_time():
    drawn = [spec_from(f"--grid={LAMBDA}=0.5,1,2,4", f"--grid={K}=0..4", "--random=6").all_settings() for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 6
    assert drawn[0] != spec_from(f"--grid={LAMBDA}=0.5,1,2,4", f"--grid={K}=0..4").all_settings()[:6]
    listed = spec_from(f"--setting={LAMBDA}=2 {K}=3", f"--setting={LAMBDA}=1 {K}=1").all_settings()
    assert listed == [((LAMBDA, "2"), (K, "3")), ((LAMBDA, "1"), (K, "1"))]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "sweeps").glob("*.py")), ids=lambda path: path.stem)
def test_presets_expand_and_survive_json(path, tmp_path):
    spec = load(str(path))
    assert from_mapping(json.loads(json.dumps(spec.to_json())), "again") == spec
    cells = (spec.baseline is not None) + len(spec.variants) * max(1, len(spec.all_settings()))
    assert len(points(spec, tmp_path)) == len(spec.rows) * cells * len(spec.seeds)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "holds no sweep; say one with --spec"),
        (["--spec=none.py"], "--spec=none.py: no such file"),
        (["--grid=objective.jepa.weight"], "KEY=VALUES is wanted"),
        (["--grid=objective.jepa.weight=1,1"], "a value comes twice"),
        (["--grid=objective.jepa.wieght=1,2"], "wieght"),
        (["--grid=train.num_steps=a,b"], "train.num_steps"),
        (["--grid=seed=1,2"], "sets `seed`"),
        (["--seeds=1,x"], "whole numbers from 0"),
        (["--seeds=1,1"], "a seed comes twice"),
        (["--variant=JEPA"], "'NAME: KEY=VALUE KEY=VALUE' is wanted"),
        (["--variant=A: x=1", "--variant=A: x=2"], "a name comes twice"),
        (["--variant=A: objective.jepa.weight='1"], "quote values as for a shell"),
        (["--grid=objective.jepa.weight=1,2", "--config.objective.jepa.weight=3"], "the sweep varies this key"),
        (["--grid=objective.jepa.weight=1,2", "--equal-compute"], "equal_compute needs a baseline"),
        (["--grid=objective.jepa.weight=1,2", "--random=3"], "random=3 of 2 settings"),
        (["--grid=objective.jepa.weight=1,2", "--metric=bleu"], "metric='bleu'"),
        (["--grid=objective.jepa.weight=1,2", "--metric=ntp_loss", "--test=a.jsonl"], "test records have tasks"),
        (["--grid=objective.jepa.weight=1,2", "--tune", "--table"], "exclude each other"),
        (["--setting=objective.jepa.weight=1", "--tune"], "takes a whole grid"),
        (["--setting=objective.jepa.weight=1", "--setting=objective.jepa.weight=1.0"], "are the same run"),
        (["--grid=objective.jepa.weight=1,2", "--jobs=0"], "--jobs=0: 1 at least"),
        (["--grid=objective.jepa.weight=1,2", "--job=2"], "unexpected '--job=2'"),
        (["--grid=objective.jepa.weight=1,2", "--only=x", "--dry-run"], "--only=x: no such point"),
        (["--grid=objective.jepa.weight=1,2", "--devices=gpu"], "--devices=gpu: cuda"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(arguments, words, tmp_path):
    with pytest.raises(UserError) as error:
        run([f"--dir={tmp_path / 'sweep'}", *arguments])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"), ("[]", "a sweep is a mapping"), ('{"sedes": [1]}', "unknown key 'sedes'"),
        ('{"seeds": "1"}', "whole numbers"), ('{"grid": {"a": 1}}', "a list of values is wanted"),
        ('{"common": {"a": null}}', "values are text"), ('{"baseline": {"A": {}, "B": {}}}', "2 baselines"),
        ('{"baseline": {"A": {}}, "variants": {"A": {}}}', "are called 'A'"),
    ],
)  # fmt: skip
def test_wrong_files_are_one_line(text, words, tmp_path):
    path = tmp_path / "sweep.json"
    path.write_text(text)
    with pytest.raises(UserError, match="sweep.json") as error:
        load(str(path))
    assert words in str(error.value)


def documented():
    for name in ("README.md", "docs/sweeps.md"):
        for block in re.findall(r"```bash\n(.*?)```", (REPOSITORY / name).read_text(), re.DOTALL):
            for line in block.splitlines():
                if "llm_jepa_jax.sweep" in line:
                    yield shlex.split(line.split("llm_jepa_jax.sweep")[1])


def test_documented_sweeps_expand(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    every = [points(read_spec(*parse(arguments)), tmp_path) for arguments in documented()]
    assert len(every) == 4 and len(every[1]) == 105


# --- Commands


def test_hostile_values_arrive_as_they_are(tmp_path, capsys):
    """In names, in what is printed for a shell, and in jobs."""
    directory = tmp_path / "a dir; 'x'"
    sweep = [f"--dir={directory}", f"--config={REPOSITORY}/configs/tiny.py:smoke", "--seeds=1"]
    sweep += ["--variant", f"V: data.train={shlex.quote(HOSTILE)}"]
    for form in ("--dry-run", "--print=shell", "--print=slurm", "--print=gke"):
        run([*sweep, form])
        [line] = [line for line in capsys.readouterr().out.split("\n+ ") if line]
        words = shlex.split(line)
        assert f"--config.data.train={HOSTILE}" in words
        assert any(word.startswith(f"--workdir={directory}/points/V_seed=1") for word in words)
        # a shell hands on the very words, and runs nothing else
        shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, cwd=tmp_path, check=True)
        assert shown.stdout.decode().split("\0")[:-1] == words
        written = sorted(path.name for path in tmp_path.rglob("*"))
        assert written == ([] if form == "--dry-run" else sorted([directory.name, "manifest.json"]))
    names = {point.name for value in ("a/b", "a b", "..", "-") for point in points(spec_of(rows={value: {}}), tmp_path)}
    assert len(names) == 4 * 5 and not any(set(name) & set("/ ;'") or name.startswith((".", "-")) for name in names)


def test_jobs_chain_training_and_test(tmp_path):
    spec = spec_of(test="test.jsonl", seeds=[1], test_examples=7)
    [point] = points(spec, tmp_path)
    [line] = job_lines(Outcome(point, "missing"), "slurm", ["--gpus-per-node=1"])
    first, second = line.split(" && ")
    assert first.startswith("job=$(sbatch --parsable --job-name=s-seed-1-") and "--gpus-per-node=1" in second
    assert "--dependency=afterok:$job" in second and "--config.data.eval=test.jsonl" in second
    trained = Outcome(point, "trained", "", {"step": 4})
    assert (
        "--dependency" not in job_lines(trained, "slurm", [])[0] and "--mode=eval" in job_lines(trained, "slurm", [])[0]
    )
    values = parse_main(["main", "--config=configs/tiny.py", *point.test_arguments])
    assert values.mode == "eval" and values.out == str(point.workdir / "test")


def test_each_process_sees_one_device():
    devices = parse_devices("cuda:0,2")
    assert devices.environment(1, 2) == {"CUDA_VISIBLE_DEVICES": "2"}
    assert devices.environment(2, 4) == {"CUDA_VISIBLE_DEVICES": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}
    assert parse_devices("tpu:0,1,2,3").environment(3, 4)["TPU_VISIBLE_CHIPS"] == "3"
    assert parse_devices("").environment(0, 2) == {}


def test_launch_sweep_shows_what_it_runs(tmp_path):
    arguments = [f"--dir={tmp_path / 'it is'}", "--spec=configs/sweeps/nl_rx_small.py", "--seeds=1", "--dry-run"]
    shown = subprocess.run(
        [sys.executable, "launch/sweep.py", *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=True
    ).stdout.splitlines()
    assert shlex.split(shown[0])[0] == "bash" and shlex.split(shown[1])[1:] == ["-m", "llm_jepa_jax.sweep", *arguments]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/sweeps/*.py")), ids=lambda path: path.stem)
def test_every_point_of_the_sweeps_that_come_along_is_a_run(path, tmp_path):
    """As `main` resolves it before it reads weights; no two are the same run."""
    every = [point for point in points(load(str(path)), tmp_path) if point.seed == PAPER_SEEDS[0]]
    assert len(every) > 1
    for point in every:
        config = resolve(freeze(parse_main(["main", *point.arguments]).config), {})
        assert config.data.train and (config.data.eval or config.data.eval_share), point.name


# --- Comparison


def test_the_paired_test_is_the_published_one():
    """Against the t distribution by hand: t = mean / (std / sqrt(n))."""
    ours, theirs = (Sample(dict(zip((82, 23, 37, 84, 4), v, strict=True))) for v in ([5, 6, 7, 9, 8], [4, 6, 5, 6, 6]))
    found = paired(ours, theirs, True)
    assert found.difference == pytest.approx(1.6) and found.n == 5
    # d = 1, 0, 2, 3, 2: mean 1.6, std 1.1402, t = 3.1379; Student's t, 4 degrees of freedom, upper tail
    t = 1.6 / (np.std([1, 0, 2, 3, 2], ddof=1) / math.sqrt(5))
    upper = 0.5 * (1 - t / math.sqrt(4 + t * t) * (1 + 2 / (4 + t * t)))
    assert found.p == pytest.approx(upper, rel=1e-9)
    assert paired(ours, theirs, False).p == pytest.approx(1 - upper)
    assert math.isnan(paired(Sample({1: 2.0}), Sample({1: 1.0}), True).p)
    assert math.isnan(paired(Sample({1: 2.0, 2: 3.0}), Sample({1: 1.0, 2: 2.0}), True).p)  # no scatter
    assert (
        paired(Sample({1: 2.0, 2: 3.0, 9: 0.0}), Sample({1: 1.0, 2: 1.0, 7: 9.0}), True).n == 2
    )  # the same seeds alone


GRID = {"baseline": {"NTP": {LAMBDA: 0}}, "variants": {"JEPA": {}}, "grid": {LAMBDA: [1, 2], K: [0, 1]}}


def score(point):
    """JEPA is better at λ = 2 on dev and at λ = 1 on test; k = 1 fails for one seed."""
    setting = dict(point.cell.setting)
    if setting.get(K) == "1" and point.seed == 37:
        return "error: no room | on `disk` <b>"
    wobble = point.seed / 1000
    if point.cell.variant == "NTP":
        return 0.5 + wobble, 0.4 + wobble, 100.0
    if setting[LAMBDA] == "2":
        return 0.7 + 2 * wobble, 0.5 + 3 * wobble, 125.0
    return 0.6 + wobble, 0.9 + 3 * wobble, 125.0


def test_the_best_setting_is_chosen_on_dev_and_by_all_seeds(tmp_path):
    spec = spec_of(**GRID, test="test.jsonl", equal_compute=True)
    outcomes = outcomes_of(spec, tmp_path, score)
    [row] = make_rows(spec, outcomes, "exact_match")
    [best] = row.best_cells
    assert dict(best.cell.setting) == {LAMBDA: "2", K: "0"}  # not λ = 1, which the test records like; not k = 1
    [cell] = scaled_cells([row])
    assert cell.steps == 8 and cell.setting == best.cell.setting  # 10 steps of 100 FLOP at 125 a step
    lines = tables.make_lines([row])
    assert [line.best for line in lines] == [False, False, False, True, False]
    chosen = lines[3]
    assert chosen.test_mean == pytest.approx(0.5 + 3 * 0.046) and chosen.difference == pytest.approx(0.1 + 2 * 0.046)
    assert chosen.p < 0.01 and chosen.flops == 1250.0
    assert "JEPA has no run at equal compute yet, or its FLOPs are not recorded" in tables.warnings([row])
    [warning] = [text for text in tables.warnings([row]) if "λ 2, k 1" in text]
    assert "no number for seed 37" in warning


def test_a_failure_is_shown_wherever_its_number_would_be(tmp_path):
    spec = spec_of(**GRID, test="test.jsonl")
    outcomes = outcomes_of(spec, tmp_path, score)
    rows = make_rows(spec, outcomes, "exact_match")
    table = tables.markdown(spec, "exact_match", rows, outcomes, tables.explanation(spec, "exact_match"))
    assert "| 4 of 5, 1 failed |" in table
    assert "| JEPA_weight=2_num_predictors=1_seed=37 | error: no room \\| on `disk` &lt;b> |" in table
    read = list(csv.DictReader(io.StringIO(tables.comma_separated(rows))))
    assert [line["failed"] for line in read] == ["0", "0", "1", "0", "1"] and read[0]["p"] == ""
    assert float(read[0]["dev_mean"]) == pytest.approx(0.546)
    whole = json.loads(tables.as_json(spec, "exact_match", rows, outcomes))
    assert sum(point["state"] == "failed" for point in whole["points"]) == 2 and len(whole["points"]) == 25
    write_page(spec, tmp_path, "exact_match", rows, outcomes, [])
    page = (tmp_path / "sweep.html").read_text()
    assert "error: no room | on `disk` &lt;b&gt;" in page and "<b>" not in page.split("<body>")[1]
    assert page.count('<td class="best" style="background:') == 1 and 'src="http' not in page and "<script" not in page


def test_equal_flops_are_not_trained_again(tmp_path):
    spec = spec_of(**GRID, equal_compute=True)
    outcomes = outcomes_of(spec, tmp_path, lambda point: (0.5 + point.seed / 1000, None, 100.0))
    [row] = make_rows(spec, outcomes, "exact_match")
    assert scaled_cells([row]) == [] and list(row.scaled.values()) == [row.best_cells[0]]
    assert any("equal compute is the same runs" in text for text in tables.warnings([row]))


def test_lower_is_better_of_losses_and_perplexities(tmp_path):
    assert not higher_is_better("perplexity") and not higher_is_better("ntp_loss") and higher_is_better("exact_match")
    assert metric_of("", "perplexity,exact_match") == "perplexity"
    spec = spec_of(**GRID)
    outcomes = outcomes_of(spec, tmp_path, lambda point: (9.0 - len(point.cell.setting), None, 1.0), "perplexity")
    [row] = make_rows(spec, outcomes, "perplexity")
    assert paired(row.cells[0].dev, row.baseline.dev, False).difference == -2.0
    curve = comparison.CellResult(row.cells[0].cell, row.cells[0].outcomes, "perplexity")
    assert curve.dev.mean == 7.0 and curve.dev.std == 0.0


# --- The tuner


def test_the_tuner_finds_good_settings_with_a_third_of_the_runs():
    """On noisy surfaces, against the whole grid and against as many runs on settings drawn at random."""
    found = [trial(number, (5, 4), 5, 1.5) for number in range(8)]
    lost = {name: np.mean([each[name] for each in found]) for name in found[0]}
    assert max(each["share of runs"] for each in found) <= 1 / 3
    assert lost["tuner"] < lost["grid"] + 0.5 < lost["random third"]


def test_the_tuner_leaves_failing_settings_alone():
    def run_some(wanted):
        return [None if place[0] == 0 else float(place[0]) for place, _ in wanted]

    tuned = tune((3, 3), 5, run_some)
    tried = [place for each in tuned.history for place, _ in each]
    assert tuned.best[0] == 2 and max(tried.count((0, i)) for i in range(3)) == 1
    assert tune((3, 3), 5, lambda wanted: [None] * len(wanted)).best is None
