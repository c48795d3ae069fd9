# SPDX-License-Identifier: Apache-2.0
"""Programs that stand in for a cluster's: gcloud, srun and kubectl run on this machine what they are given for another.

Our scripts run unchanged, and so does what they generate; only the machines around them are staged. Every program
writes its arguments, each ended by a NUL, to a file of its own name under `calls/`, one call after the other.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY

RECORD = """#!/usr/bin/env bash
printf '%s\\0' "$@" '<end>' >>"$STAGE/calls/${0##*/}"
"""

PYTHON = (
    RECORD
    + """
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m llm_jepa_jax.main")
    printf '%s\\0' "$PWD" "${GREETING-}" >"$STAGE/surroundings"
    exits=$(head -n 1 "$STAGE/exits" 2>/dev/null)
    sed -i 1d "$STAGE/exits"
    if [ "$exits" = wait ]; then
        trap 'exit 0' TERM
        echo ready >"$STAGE/ready"
        while true; do read -r -t 0.1 <>"$STAGE/never" || true; done
    fi
    exit "${exits:-0}"
    ;;
esac
"""
)
"""A Python that makes environments of itself, installs nothing, and ends runs as the lines of `exits` say."""

OLD_PYTHON = "#!/usr/bin/env bash\nexit 1\n"

GCLOUD = (
    RECORD
    + """
[ "$1 $2 $3" = "compute tpus queued-resources" ] || { echo "unknown: $*" >&2; exit 1; }
verb=$4
resource=$5
shift 5
for flag in "$@"; do
    case $flag in --command=*) command=${flag#*=} ;; esac
done
vm=$STAGE/vm
# A machine that goes takes its processes along.
gone() {
    kill -KILL -- "-$(cut -d' ' -f1 "$vm/llm_jepa_jax/runs/launch/process")" 2>/dev/null
    rm -rf "$vm"
}
case $verb in
create) mkdir "$vm" && echo ACTIVE >"$STAGE/state" ;;
list)
    # A preemption, when the scenario has one for this many looks.
    looks=$(($(cat "$STAGE/looks" 2>/dev/null || echo 0) + 1))
    echo "$looks" >"$STAGE/looks"
    if [ "$looks" = "$(cat "$STAGE/preempt_at" 2>/dev/null)" ]; then gone && echo SUSPENDED >"$STAGE/state"; fi
    names=projects/p/locations/z/queuedResources
    printf '%s\\t%s\\n' "$names/other" ACTIVE
    if [ -f "$STAGE/state" ]; then printf '%s\\t%s\\n' "$names/pod" "$(cat "$STAGE/state")"; fi
    ;;
describe) cat "$STAGE/state" ;;
delete) gone && rm -f "$STAGE/state" ;;
scp) cp "$resource" "$vm/${1#*:}" ;;
ssh)
    # What other workers would say, if the scenario has them: a line a look, workers between semicolons.
    if [ -s "$STAGE/answers" ] && [ "${command#*worker.sh state}" != "$command" ]; then
        head -n 1 "$STAGE/answers" | tr ';' '\\n'
        exec sed -i 1d "$STAGE/answers"
    fi
    cd "$vm" && HOME=$vm exec bash -c "$command" </dev/null
    ;;
*) exit 1 ;;
esac
"""
)

SRUN = (
    RECORD
    + """
while [ "${1#--}" != "$1" ]; do shift; done
echo $$ >"$STAGE/task"
exec "$@"
"""
)

SCANCEL = RECORD + 'kill -TERM "$(cat "$STAGE/task")"\n'

KUBECTL = RECORD + 'cat >"$STAGE/manifest"\nexit "$(cat "$STAGE/exits" 2>/dev/null || echo 0)"\n'


class Stage:
    """A directory with the programs, in front of the system's own on PATH, and a checkout to start from."""

    def __init__(self, path: pathlib.Path, checkout: pathlib.Path, **programs: str) -> None:
        self.path = path
        self.checkout = checkout
        self.programs = path / "bin"
        for part in ("bin", "calls", "home"):
            (path / part).mkdir(parents=True)
        for name in ("ready", "never"):
            os.mkfifo(path / name)
        for name, text in programs.items():
            program = self.programs / name.replace("_", ".")
            program.write_text(text)
            program.chmod(0o755)
        self.environment = {
            "PATH": f"{self.programs}:/usr/bin:/bin", "STAGE": str(path), "HOME": str(path / "home"), "LANG": "C.UTF-8"
        }  # fmt: skip

    def close(self) -> None:
        """Ends detached runs that a test left."""
        for file in self.path.parent.rglob("runs/launch/process"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.read_text().split()[0]), signal.SIGKILL)

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def run(self, *command: str, code: int = 0, **extra: str) -> subprocess.CompletedProcess:
        """Runs to the end, with further variables, and expects the exit code."""
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.checkout, env=self.environment | extra, timeout=60,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, done.stderr + done.stdout
        return done

    def start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.checkout, env=self.environment
        )

    def wait_until_ready(self) -> None:
        """Until a run that `exits` told to wait is there."""
        assert (self.path / "ready").read_text() == "ready\n"

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of every call of a program."""
        file = self.path / "calls" / program
        words = file.read_bytes().decode().split("\0")[:-1] if file.exists() else []
        found: list[list[str]] = [[]]
        for word in words:
            if word == "<end>":
                found.append([])
            else:
                found[-1].append(word)
        return found[:-1]

    def runs(self) -> list[list[str]]:
        """What `python -m llm_jepa_jax.main` was given, run by run."""
        return [call[2:] for call in self.calls("python") if call[:2] == ["-m", "llm_jepa_jax.main"]]

    def verbs(self) -> list[str]:
        """What gcloud was asked to do, looks at the resource and at the run left out."""
        asked = [(call[3], call[-1]) for call in self.calls("gcloud")]
        return [verb for verb, last in asked if verb not in ("list", "describe") and "worker.sh state" not in last]


HOSTILE = (
    "--config.data.train=my data/a b.jsonl",
    "it's",
    'say "hi"',
    "$(touch pwned)`touch pwned`",
    "$HOME ${PATH} $$",
    "*",
    "[a-z]?",
    "a;touch pwned&&b|c>d<e",
    "line one\nline two",
    "tab\there",
    "\\",
    "\\n trailing\\",
    "!history #comment",
    "~",
    "{a,b}",
    "",
    "--dry-run",
    "--",
    "ünï😀",
    "%s%n %q",
    "-n",
)
"""Arguments that any shell or template on the way would change if it could."""


def tool(name: str) -> str:
    """A program of the test extra."""
    path = shutil.which(name, path=str(pathlib.Path(sys.executable).parent)) or shutil.which(name)
    assert path, f"{name} is missing: bash launch/test.sh installs the test extra"
    return path


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> pathlib.Path:
    """A repository of the test's own with what goes to the workers; of the package, a file."""
    there = tmp_path / "checkout"
    for name in ("configs", "launch"):
        shutil.copytree(REPOSITORY / name, there / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "llm_jepa_jax/main.py"):
        (there / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, there / name)
    return there


@pytest.fixture
def stage(tmp_path: pathlib.Path, checkout: pathlib.Path) -> Iterator[Stage]:
    staged = Stage(tmp_path / "stage", checkout, gcloud=GCLOUD, python=PYTHON, python3=PYTHON)
    yield staged
    staged.close()
