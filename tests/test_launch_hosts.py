# SPDX-License-Identifier: Apache-2.0
"""launch/ where the run is: worker.sh, the Slurm job around it, and the container."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.conftest import REPOSITORY
from tests.fake_cluster import HOSTILE, OLD_PYTHON, PYTHON, RECORD, SCANCEL, SRUN, Stage, checkout, stage, tool

__all__ = ["checkout", "stage"]
LAUNCH = REPOSITORY / "launch"
RUN = ("--config=configs/llama8b.py", "--workdir=/mnt/runs/run")


def test_a_run_that_was_told_to_stop_is_not_taken_for_a_finished_one(stage):
    """The run saves and exits with 0 at a SIGTERM; 143 tells who started it to start it again."""
    stage.write("exits", "wait\n0\n3\n")
    stopped = stage.start("bash", "launch/worker.sh", "run", *HOSTILE)
    stage.wait_until_ready()
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=60)
    assert stopped.returncode == 143
    stage.run("bash", "launch/worker.sh", "run")
    stage.run("bash", "launch/worker.sh", "run", code=3)
    assert stage.runs() == [list(HOSTILE), [], []]


def test_a_detached_run_is_seen_stopped_and_never_doubled(stage):
    worker = ("bash", "launch/worker.sh")
    assert "run-state none" in stage.run(*worker, "state").stdout
    stage.write("exits", "wait\n")
    stage.run(*worker, "start", "--workdir=/mnt/b/r")
    stage.wait_until_ready()
    assert "run-state running" in stage.run(*worker, "state").stdout
    assert "a run is going on here already" in stage.run(*worker, "start", code=2).stderr
    stage.run(*worker, "stop")
    assert "run-state stopped" in stage.run(*worker, "state").stdout
    (stage.checkout / "runs" / "launch" / "exit").unlink()
    assert "run-state killed" in stage.run(*worker, "state").stdout
    assert "no run is going on" in stage.run(*worker, "stop").stdout


def test_a_machine_with_an_old_python_gets_one_of_its_own(tmp_path, checkout):
    """As images of TPU VMs are: Python 3.10, and none of the newer names."""
    old = {name: OLD_PYTHON for name in ("python3", "python3_13", "python3_12", "python3_11")}
    uv = RECORD + f'mkdir -p "$HOME/.local/bin" && cat >"$HOME/.local/bin/python3.12" <<"END"\n{PYTHON}\nEND\n'
    uv += 'chmod +x "$HOME/.local/bin/python3.12"\n'
    stage = Stage(tmp_path / "stage", checkout, uv=uv, **old)
    stage.run("bash", "launch/worker.sh", "install", "tpu")
    assert stage.calls("uv") == [["python", "install", "3.12"]]
    assert stage.calls("python")[-1] == ["-m", "pip", "install", "--quiet", "--editable", ".[tpu]"]


# --- Slurm -----------------------------------------------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}


@pytest.fixture
def slurm(tmp_path, checkout):
    stage = Stage(
        tmp_path / "stage", checkout, srun=SRUN, scancel=SCANCEL, scontrol=RECORD, python=PYTHON, python3=PYTHON
    )
    copied = tmp_path / "spool" / "slurm_script"  # where Slurm runs it from
    copied.parent.mkdir()
    shutil.copy(LAUNCH / "slurm.sbatch", copied)
    stage.environment |= JOB | {"SLURM_SUBMIT_DIR": str(checkout)}
    stage.job = ("bash", str(copied))
    return stage


def test_a_slurm_job_runs_the_same_arguments_in_every_task(slurm):
    slurm.run(*slurm.job, *HOSTILE, SLURM_CPUS_PER_TASK="4")
    assert slurm.runs() == [list(HOSTILE)] and slurm.calls("scontrol") == []
    [call] = slurm.calls("srun")
    assert call[call.index("bash") :] == ["bash", "launch/worker.sh", "run", *HOSTILE]
    assert ["-m", "pip", "install", "--quiet", "--editable", ".[cuda]"] in slurm.calls("python")
    shown = slurm.run(*slurm.job, "--dry-run", *HOSTILE).stdout
    assert len(slurm.calls("srun")) == 1
    slurm.run("bash", "-c", shown)
    assert slurm.calls("srun") == [call, call]


def test_a_slurm_job_at_its_time_limit_saves_and_is_queued_again(slurm):
    slurm.write("exits", "wait\n")
    job = slurm.start(*slurm.job, *RUN)
    slurm.wait_until_ready()
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == 143
    assert slurm.calls("scancel") == [["--signal=TERM", "7"]] and slurm.calls("scontrol") == [["requeue", "7"]]


def test_a_slurm_job_that_is_cancelled_or_fails_is_not_queued_again(slurm):
    slurm.write("exits", "wait\n2\n1\n")
    job = slurm.start(*slurm.job, *RUN)
    slurm.wait_until_ready()
    job.send_signal(signal.SIGTERM)  # Slurm tells the shell and the tasks
    slurm.run("scancel", "7")
    job.communicate(timeout=60)
    assert job.returncode == 143
    slurm.run(*slurm.job, *RUN, code=2)
    slurm.run(*slurm.job, *RUN, code=1)
    assert slurm.calls("scontrol") == []


@pytest.mark.parametrize("code", ["75", "137"], ids=["peers are gone", "killed"])
def test_a_slurm_job_that_may_do_better_is_queued_again_up_to_a_limit(slurm, code):
    """Each start of a queued job is this script anew; other jobs have counts of their own."""
    slurm.write("exits", f"{code}\n" * 4)
    for number in (1, 2):
        said = slurm.run(*slurm.job, *RUN, code=int(code), MAX_RESTARTS="2").stderr
        assert f"ended with code {code}; it is queued again, for the {number}. of at most 2 times" in said
    assert slurm.calls("scontrol") == [["requeue", "7"]] * 2
    said = slurm.run(*slurm.job, *RUN, code=int(code), MAX_RESTARTS="2").stderr
    assert f"ended with code {code}, 3 failures by now; it is not queued again" in said
    assert slurm.calls("scontrol") == [["requeue", "7"]] * 2
    slurm.run(*slurm.job, *RUN, code=int(code), SLURM_JOB_ID="8", MAX_RESTARTS="2")
    assert slurm.calls("scontrol")[2:] == [["requeue", "8"]]
    said = slurm.run(*slurm.job, *RUN, code=2, MAX_RESTARTS="few").stderr
    assert said.endswith("MAX_RESTARTS=few: a whole number, of failures after which the job ends\n")


def test_a_slurm_job_of_a_wrong_shape_is_refused(slurm, tmp_path):
    assert "8 tasks for 4 GPUs" in slurm.run(*slurm.job, code=2, SLURM_GPUS_ON_NODE="4").stderr
    assert "not the repository's root" in slurm.run(*slurm.job, code=2, SLURM_SUBMIT_DIR=str(tmp_path)).stderr
    assert "not in a Slurm job" in slurm.run(*slurm.job, code=2, SLURM_JOB_ID="").stderr
    assert slurm.calls("srun") == []


# --- the container ---------------------------------------------------------------------------------------------------

DOCKERFILE = LAUNCH / "Dockerfile"


def instructions():
    """(stage number, instruction, rest) of the Dockerfile."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ")
    number = 0
    for line in text.splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            number += name == "FROM"
            yield number, name, rest


def copied(number):
    """(source, destination) of what a stage takes from the repository."""
    for at, name, rest in instructions():
        if (at, name) == (number, "COPY") and "--from" not in rest:
            *sources, destination = rest.split()
            yield from ((source, destination) for source in sources)


def test_the_dockerfile_is_sound():
    found = subprocess.run([tool("hadolint"), str(DOCKERFILE)], capture_output=True, text=True)
    assert found.returncode == 0 and not found.stdout, found.stdout
    users = [rest for number, name, rest in instructions() if (number, name) == (2, "USER")]
    assert users and users[-1] not in ("0", "root")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    [python] = re.findall(r"^ARG PYTHON=3\.(\d+)$", DOCKERFILE.read_text(), re.MULTILINE)
    least = re.search(r"3\.(\d+)", project["requires-python"]).group(1)
    assert int(python) >= int(least)
    assert f'"3.{python}"' in (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text()
    named = re.search(r"EXTRA: (.*), or nothing", DOCKERFILE.read_text()).group(1).split(", ")
    assert named == ["tpu", "cuda"] and set(named) <= set(project["optional-dependencies"])


def test_the_image_gets_what_it_copies_and_nothing_else():
    sources = {source for number in (1, 2) for source, _ in copied(number)}
    assert all((REPOSITORY / source).exists() for source in sources)
    ignore = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*" and {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert not sources & {".", "tests", "docs", ".git"}


def test_the_environment_comes_from_pyproject_alone(tmp_path, stage):
    """The build stage's install, on a copy of the very files it has; then the entry point in the image's layout."""
    for source, destination in copied(1):
        target = (
            tmp_path / "source" / destination / source if destination == "./" else tmp_path / "source" / destination
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy)(REPOSITORY / source, target)
    [install] = [rest for number, name, rest in instructions() if (number, name) == (1, "RUN")]
    [requirement] = re.findall(r"pip install --no-cache-dir (\S+)$", install)
    for extra, wanted in (("", "."), ("tpu", ".[tpu]"), ("cuda,hf", ".[cuda,hf]")):
        assert stage.run("bash", "-c", f"printf %s {requirement}", EXTRA=extra).stdout == wanted
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
         "--wheel-dir", str(tmp_path / "wheels"), ".[tpu]"],
        check=True, cwd=tmp_path / "source",
    )  # fmt: skip
    [wheel] = (tmp_path / "wheels").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "llm_jepa_jax").rglob("*.py")}
    assert package <= names and not any(name.startswith("tests") for name in names)


def test_the_container_starts_the_run_it_is_given(stage, tmp_path):
    app = tmp_path / "app"
    for source, destination in copied(2):
        target = app / source if destination.endswith("/") else app / destination
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy)(REPOSITORY / source, target)
    [entry] = [rest for _, name, rest in instructions() if name == "ENTRYPOINT"]
    stage.checkout = app
    stage.run(*json.loads(entry), *HOSTILE)
    assert stage.runs() == [list(HOSTILE)]
