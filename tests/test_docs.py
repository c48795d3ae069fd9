# SPDX-License-Identifier: Apache-2.0
"""Documents that are made stay fresh, and the commands they name exist."""

import re
import shlex
import subprocess
import sys

import pytest

from llm_jepa_jax.config import describe
from llm_jepa_jax.main import parse
from tests.conftest import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BENCHMARKS = sorted((REPOSITORY / "tests" / "benchmarks").glob("*.py"))
LAUNCH = REPOSITORY / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", REPOSITORY / ".ci" / "run"]
SOURCED = ("common.sh", "setup.sh")


def test_the_key_list_is_fresh():
    made = (REPOSITORY / "docs" / "config.md").read_text()
    assert made == describe(), "run `python -m llm_jepa_jax.config > docs/config.md`"


def commands():
    """Every `python -m llm_jepa_jax.main` command of the documents, as argument lists."""
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if "llm_jepa_jax.main" in line:
                    arguments = shlex.split(line.split("llm_jepa_jax.main")[1], comments=True)
                    yield pytest.param(arguments, id=f"{document.name}:{' '.join(arguments)[:60]}")


@pytest.mark.parametrize("arguments", commands())
def test_documented_commands_parse(arguments, monkeypatch):
    """Presets, keys and flags of every command in the documents exist (a run directory of one's own aside)."""
    monkeypatch.chdir(REPOSITORY)
    if not any(a.startswith(("--config=", "--mode=verify", "--mode=analyze")) for a in arguments):
        arguments = ["--config=configs/tiny.py", *arguments]
    parse(["main", *arguments])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


HELP = """
import pathlib, runpy, sys
for path in map(pathlib.Path, sys.argv[1:]):
    sys.argv, sys.path[0] = [str(path), "--help"], str(path.parent)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, path
    else:
        raise AssertionError(f"{path} shows no help")
"""


def test_benchmarks_are_documented_and_start():
    """Up to their help, in one process: what they import is what takes time."""
    page = (REPOSITORY / "docs" / "performance.md").read_text()
    assert not [path.name for path in BENCHMARKS if f"tests/benchmarks/{path.name}" not in page]
    helps = helps_of([path for path in BENCHMARKS if path.name != "pytorch.py"])
    assert helps == len(BENCHMARKS) - 1 > 5


@pytest.mark.parity
def test_the_benchmark_of_the_published_code_starts():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert helps_of([REPOSITORY / "tests" / "benchmarks" / "pytorch.py"]) == 1


def helps_of(paths):
    """How many of these programs show their help."""
    command = [sys.executable, "-c", HELP, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.count("show this help message and exit")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_say_so(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.name not in SOURCED:
        assert script.stat().st_mode & 0o111 and "set -euo pipefail" in script.read_text()


def test_the_readme_names_the_two_commands_and_the_workflow_runs_them():
    readme = (REPOSITORY / "README.md").read_text()
    workflow = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text()
    assert "bash launch/local.sh" in readme and "bash launch/test.sh" in readme
    assert "bash launch/local.sh" in workflow and ".ci/run" in workflow
    assert "bash launch/test.sh" in (REPOSITORY / ".ci" / "run").read_text()
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    checks = re.findall(
        r"^\.venv/bin/((?:ruff|mypy).*)$", (REPOSITORY / "launch" / "test.sh").read_text(), re.MULTILINE
    )
    assert len(checks) == 3 and all(f".venv/bin/{check}" in hooks for check in checks)
