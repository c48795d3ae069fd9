# SPDX-License-Identifier: Apache-2.0
"""launch/: what the scripts say they run, what arrives at the other end, and how a run on TPU VMs comes back."""

import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest

from llm_jepa_jax.main import parse
from tests.conftest import REPOSITORY
from tests.fake_cluster import HOSTILE, checkout, stage, tool

__all__ = ["checkout", "stage"]
LAUNCH = REPOSITORY / "launch"
TPU = ("bash", "launch/tpu_vm.sh")
PLACE = ("--name=pod", "--zone=us-east5-a")
RUN = ("--config=configs/llama8b.py", "--workdir=/mnt/runs/run")


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
        ("v5e:16x16", ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"]),
        ("v5p:2x2x1", ["--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5"]),
        ("v5p:8x8x16", ["--accelerator-type=v5p-2048", "--runtime-version=v2-alpha-tpuv5"]),
        ("v6e:8x16", ["--accelerator-type=v6e-128", "--runtime-version=v2-alpha-tpuv6e"]),
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


@pytest.mark.parametrize("code,failures", [("143", 0), ("1", 1), ("75", 1)])
def test_a_run_that_ended_early_starts_again_on_the_machines_it_has(stage, code, failures):
    stage.write("exits", f"{code}\n")
    stage.run(*TRAIN, f"--max-restarts={failures}", "--", *RUN)
    assert stage.verbs() == ["create", *UP, "ssh", "ssh"] and stage.runs() == [list(RUN)] * 2


def test_many_workers_are_one_run(stage):
    """It runs where all of them run; what is missing or stopped anywhere starts it anew everywhere."""
    looks = [
        "none;none", "running;running",
        "running",  # a slice that cannot be reached for once
        *["running;none"] * 5,  # a machine that was replaced, while the others wait for it
        "stopped;none", "running;running", "refused;failed", "finished;running", "stopped;finished",
        "finished;finished",
    ]  # fmt: skip
    stage.write("answers", "".join(re.sub(r"(\w+)", r"run-state \1 host", look) + "\n" for look in looks))
    said = stage.run(*TRAIN, "--", *RUN).stderr
    told = [line.partition("run: ")[2] for line in said.splitlines() if " pod: run: " in line]
    seen = "none running unreachable partly none running failed running stopped finished"
    assert told == seen.split()
    restart = ["ssh", "ssh"]  # stop, start
    assert stage.verbs() == ["create", *UP, "ssh", *UP, *restart, *restart]


def test_another_run_on_the_same_machines_is_not_taken_for_this_one(stage):
    stage.run(*TRAIN, "--", *RUN)
    stage.run(*TRAIN, "--", *RUN)  # finished: nothing to do
    stage.run(*TRAIN, "--", *RUN, "--config.seed=1")
    assert stage.runs() == [list(RUN), [*RUN, "--config.seed=1"]]
    stage.write("exits", "wait\n")
    stage.run(*TPU, "start", *PLACE, "--", *RUN)
    stage.wait_until_ready()
    assert "another run is going on there" in stage.run(*TRAIN, "--", *RUN, "--config.seed=2", code=2).stderr
    stage.run(*TPU, "stop", *PLACE)


def test_failures_are_counted_and_wrong_input_is_not_tried_again(stage, tmp_path):
    stage.write("exits", "1\n1\n1\n")
    said = stage.run(*TRAIN, "--max-restarts=1", "--", *RUN, code=2).stderr
    assert "the run failed, 2 failures by now" in said and len(stage.runs()) == 2
    stage.run(*TPU, "delete", *PLACE)
    stage.write("exits", "2\n")
    assert "the run refused its input" in stage.run(*TRAIN, "--", *RUN, code=2).stderr
    assert len(stage.runs()) == 3


def test_without_gcloud_or_an_answer_from_it_nothing_is_waited_for(stage):
    """One look that fails later is a matter of patience; the first one is a matter of set-up."""
    (stage.programs / "gcloud").write_text("#!/usr/bin/env bash\necho 'no credentials' >&2\nexit 1\n")
    said = stage.run(*TRAIN, "--", *RUN, code=2).stderr
    assert "no credentials" in said and "gcloud cannot list the queued resources of --zone=us-east5-a" in said
    (stage.programs / "gcloud").unlink()
    for program in ("bash", "dirname"):
        (stage.programs / program).symlink_to(shutil.which(program))
    said = stage.run(*TRAIN, "--", *RUN, code=2, PATH=str(stage.programs)).stderr
    assert "gcloud was not found" in said


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
        (("create", *PLACE, "--topology=v5p:2x2x16"), "gcloud gives 64 chips of v5p as 4x4x4"),
        (("create", *PLACE, "--topology=v6e:2x8"), "gcloud gives 16 chips of v6e as 4x4"),
        (("create", *PLACE, "--topology=v5p:3x3x3"), "gcloud gives 27 chips of v5p as no shape at all"),
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
        assert "ARG " + flags["build-arg"].partition("=")[0] in (LAUNCH / "Dockerfile").read_text()
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
