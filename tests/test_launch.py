# SPDX-License-Identifier: Apache-2.0
"""launch/: what the scripts say they run, what arrives at the other end, and how they go on after a preemption."""

import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

from llm_jepa_jax.main import parse
from tests.conftest import REPOSITORY
from tests.fake_cluster import GCLOUD, HOSTILE, OLD_PYTHON, PYTHON, RECORD, SCANCEL, SRUN, Stage

LAUNCH = REPOSITORY / "launch"
TPU = ("bash", "launch/tpu_vm.sh")
PLACE = ("--name=pod", "--zone=us-east5-a")
RUN = ("--config=configs/llama8b.py", "--workdir=gs://bucket/run")
ALL_PYTHONS = {name: PYTHON for name in ("python", "python3")}


def tool(name):
    """A program of the test extra."""
    path = shutil.which(name, path=str(REPOSITORY / ".venv" / "bin")) or shutil.which(name)
    assert path, f"{name} is missing: bash launch/test.sh installs the test extra"
    return path


@pytest.fixture
def checkout(tmp_path):
    """A repository of the test's own: what goes to the workers, and no more."""
    there = tmp_path / "checkout"
    for name in ("llm_jepa_jax", "configs", "launch"):
        shutil.copytree(REPOSITORY / name, there / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, there)
    return there


@pytest.fixture
def stage(tmp_path, checkout):
    staged = Stage(tmp_path / "stage", checkout, gcloud=GCLOUD, **ALL_PYTHONS)
    yield staged
    staged.close()


@pytest.mark.parametrize(
    "script", [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", REPOSITORY / ".ci" / "run"], ids=lambda p: p.name
)
def test_shellcheck_finds_nothing(script):
    found = subprocess.run([tool("shellcheck"), "-x", str(script)], capture_output=True, text=True, cwd=REPOSITORY)
    assert found.returncode == 0, found.stdout


# --- Cloud TPU VMs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "create", "copy", "install", "start", "status", "tail", "stop", "delete"])
def test_a_dry_run_shows_the_commands_and_runs_none(stage, command):
    shown = stage.run(*TPU, command, *PLACE, "--topology=v5p:4x4x4", "--dry-run", "--", *RUN).stdout
    commands = [shlex.split(line) for line in shown.splitlines() if not line.startswith("#")]
    assert commands and all(words[0] in ("gcloud", "mkdir", "tar") for words in commands)
    assert all("--zone=us-east5-a" in words for words in commands if words[0] == "gcloud")
    assert stage.calls("gcloud") == [] and not (stage.checkout / "runs").exists()


@pytest.mark.parametrize(
    "topology,flags",
    [
        ("v4:2x2x4", ["--type=v4", "--topology=2x2x4", "--runtime-version=tpu-ubuntu2204-base"]),
        ("v5e:16x16", ["--type=v5litepod", "--topology=16x16", "--runtime-version=v2-alpha-tpuv5-lite"]),
        ("v5p:4x4x4", ["--type=v5p", "--topology=4x4x4", "--runtime-version=v2-alpha-tpuv5"]),
        ("v6e:8x16", ["--type=v6e", "--topology=8x16", "--runtime-version=v2-alpha-tpuv6e"]),
        ("tpu7x:4x4x8", ["--accelerator-type=tpu7x-256", "--runtime-version=v2-alpha-tpu7-ubuntu2404"]),
    ],
)
def test_a_topology_becomes_what_gcloud_calls_it(stage, topology, flags):
    stage.run(*TPU, "create", *PLACE, f"--topology={topology}", "--project=p", "--spot")
    [call] = stage.calls("gcloud")
    assert call[:5] == ["compute", "tpus", "queued-resources", "create", "pod"]
    assert call[5:] == ["--zone=us-east5-a", "--project=p", "--node-id=pod", *flags, "--spot"]


def test_several_slices_and_further_flags(stage):
    further = "--create-flag=--labels=a=b c"
    stage.run(*TPU, "create", *PLACE, "--accelerator-type=v5p-8", "--runtime-version=r 1", "--slices=3", further)
    [call] = stage.calls("gcloud")
    slices = ["--node-count=3", "--node-prefix=pod", "--accelerator-type=v5p-8", "--runtime-version=r 1"]
    assert call[6:] == [*slices, "--labels=a=b c"]


def test_every_argument_arrives_as_it_was_typed(stage, tmp_path):
    """Through gcloud's --command, the remote shell, and the worker's script, into Python's arguments."""
    data = tmp_path / "my $(data)'s file.jsonl"
    data.write_text("{}\n")
    stage.run(*TPU, "create", *PLACE, "--topology=v5e:2x2")
    stage.run(*TPU, "copy", *PLACE, f"--with={data}")
    stage.run(*TPU, "start", *PLACE, "--env=GREETING=it's $(me) *", "--", *RUN, *HOSTILE)
    while "run-state finished" not in stage.run(*TPU, "status", *PLACE).stdout:
        pass
    assert stage.runs() == [[*RUN, *HOSTILE]]
    directory, greeting, _ = (stage.path / "surroundings").read_text().split("\0")
    worker = stage.path / "vm" / "llm_jepa_jax"
    assert directory == str(worker) and greeting == "it's $(me) *"
    assert (worker / data.name).read_text() == "{}\n" and (worker / "configs" / "tiny.py").is_file()
    assert not list(tmp_path.rglob("pwned"))


def test_what_a_dry_run_shows_can_be_run(stage, tmp_path):
    shown = stage.run(*TPU, "train", *PLACE, "--topology=v5e:2x2", "--dry-run", "--", *RUN, *HOSTILE).stdout
    script = tmp_path / "shown.sh"
    script.write_text(shown.partition("# then")[0])
    stage.run("bash", str(script))
    while "run-state finished" not in stage.run(*TPU, "status", *PLACE).stdout:
        pass
    assert stage.verbs() == ["create", "scp", "ssh", "ssh", "ssh"] and stage.runs() == [[*RUN, *HOSTILE]]


TRAIN = (*TPU, "train", *PLACE, "--topology=v5e:2x2", "--poll=0")
UP = ["scp", "ssh", "ssh", "ssh"]
"""Copy (two calls), install and start."""


def test_a_run_goes_to_its_end_by_one_command(stage):
    said = stage.run(*TRAIN, "--delete-after", "--", *RUN).stderr
    assert stage.verbs() == ["create", *UP, "delete"] and stage.runs() == [list(RUN)]
    assert "+ gcloud compute tpus queued-resources create pod" in said and "the run has ended" in said
    (stage.checkout / "llm_jepa_jax" / "__pycache__").mkdir()
    stage.run(*TPU, "create", *PLACE, "--topology=v5e:2x2")
    stage.run(*TPU, "copy", *PLACE)
    with tarfile.open(stage.checkout / "runs" / "launch" / "pod.tar.gz") as archive:
        files = archive.getnames()
    tops = {name.partition("/")[0] for name in files}
    assert tops == {"pyproject.toml", "README.md", "LICENSE", "llm_jepa_jax", "configs", "launch"}
    assert not any("__pycache__" in name for name in files)


def test_a_preempted_run_gets_new_machines_and_goes_on_with_the_same_arguments(stage):
    stage.write("exits", "wait\n")
    stage.write("preempt_at", "4\n")
    training = stage.start(*TRAIN, "--", *RUN, *HOSTILE)
    stage.wait_until_ready()
    _, said = training.communicate(timeout=60)
    assert training.returncode == 0, said
    assert "resource: SUSPENDED" in said
    assert stage.verbs() == ["create", *UP, "delete", "create", *UP]
    assert stage.runs() == [[*RUN, *HOSTILE]] * 2


@pytest.mark.parametrize("code,failures", [("143", 0), ("1", 1)])
def test_a_run_that_ended_early_starts_again_on_the_machines_it_has(stage, code, failures):
    stage.write("exits", f"{code}\n")
    stage.run(*TRAIN, f"--max-restarts={failures}", "--", *RUN)
    assert stage.verbs() == ["create", *UP, "ssh", "ssh"] and stage.runs() == [list(RUN)] * 2


def test_failures_are_counted_and_wrong_input_is_not_tried_again(stage, tmp_path):
    stage.write("exits", "1\n1\n1\n")
    said = stage.run(*TRAIN, "--max-restarts=1", "--", *RUN, code=2).stderr
    assert "the run failed, 2 times by now" in said and len(stage.runs()) == 2
    stage.run(*TPU, "delete", *PLACE)
    stage.write("exits", "2\n")
    assert "the run refused its input" in stage.run(*TRAIN, "--", *RUN, code=2).stderr
    assert len(stage.runs()) == 3


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("explode",), "no such command"),
        (("stop", "--name=Pod", "--zone=z"), "--name=Pod: lower-case"),
        (("stop", "--name=a;b", "--zone=z"), "--name=a;b: lower-case"),
        (("stop", "--name=pod"), "--zone is missing"),
        (("stop", *PLACE, "--slices=two"), "--slices=two: a whole number"),
        (("stop", *PLACE, "--max-hops=1"), "--max-hops=1: no such option"),
        (("stop", *PLACE, "--env=1x=2"), "--env=1x=2: NAME=VALUE"),
        (("copy", *PLACE, "--with=/no/such"), "--with=/no/such: no such file"),
        (("create", *PLACE), "--topology=: no such kind of TPU; one of v4 v5e v5p v6e tpu7x"),
        (("create", *PLACE, "--topology=v9:2x2"), "--topology=v9:2x2: no such kind"),
        (("create", *PLACE, "--topology=v5p:4x4"), "v5p has 3 dimensions"),
        (("create", *PLACE, "--topology=v5e:4x$(id)"), "a shape such as"),
        (("create", *PLACE, "--accelerator-type=v5p-8"), "name its --runtime-version"),
        (("start", *PLACE), "--workdir=: a run goes on from its directory"),
        (("start", *PLACE, "--", "--workdir=runs/x"), "--workdir=runs/x: a run goes on from its directory"),
        (("start", *PLACE, "--", "--workdir", "runs/x"), "--workdir=runs/x: a run goes on from its directory"),
    ],
)
def test_wrong_input_stops_with_one_line(stage, arguments, message):
    said = stage.run(*TPU, *arguments, code=2).stderr
    assert message in said and said.startswith("error: ") and said.count("\n") == 1
    assert stage.calls("gcloud") == []


# --- on the workers --------------------------------------------------------------------------------------------------


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
    stage.run(*worker, "start", "--workdir=gs://b/r")
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
    stage = Stage(tmp_path / "stage", checkout, srun=SRUN, scancel=SCANCEL, scontrol=RECORD, **ALL_PYTHONS)
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
    for stage, name, rest in instructions():
        if (stage, name) == (number, "COPY") and "--from" not in rest:
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


# --- what the documents say ------------------------------------------------------------------------------------------


def documented():
    """The launch commands of the documents, one line each."""
    for document in (REPOSITORY / "README.md", REPOSITORY / "docs" / "pods.md"):
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"launch/(tpu_vm\.sh|slurm\.sbatch|gke/jobset\.py|Dockerfile)", line):
                    yield pytest.param(shlex.split(line, comments=True), id=line[:70])


@pytest.mark.parametrize("words", documented())
def test_documented_commands_run_dry(stage, words, monkeypatch):
    if words[0] == "docker":
        flags = dict(word.lstrip("-").split("=", 1) for word in words[2:-1])
        assert words[1] == "build" and (REPOSITORY / flags["file"]).is_file() and words[-1] == "."
        assert "ARG " + flags["build-arg"].partition("=")[0] in DOCKERFILE.read_text()
        return
    if words[0] == "sbatch":
        at = words.index("launch/slurm.sbatch")
        assert all(word.startswith("--") for word in words[1:at])
        dry, run = ["bash", words[at], "--dry-run", *words[at + 1 :]], words[at + 1 :]
    else:
        end = words.index("--") if "--" in words else len(words)
        if words[0] == "python":
            words = [sys.executable, *words[1:]]
        files = [word.partition("=")[2] for word in words[:end] if word.startswith("--with=")]
        for name in files:
            stage.write(name, "")
        dry, run = [*words[:end], "--dry-run", *words[end:]], words[end + 1 :]
        dry = [word.replace("--with=", f"--with={stage.path}/") for word in dry]
    assert stage.run(*dry).stdout
    if run:
        monkeypatch.chdir(REPOSITORY)
        parse(["main", *run])


def test_the_scripts_hold_no_hyper_parameters():
    """They pass on what they are given; the one thing they read of it is the run's directory."""
    text = "".join(
        path.read_text()
        for path in itertools.chain(LAUNCH.glob("*.sh"), LAUNCH.glob("gke/*"), [LAUNCH / "slurm.sbatch"])
    )
    assert not re.findall(r"--config\.(?!a\.b)\w+", text)
