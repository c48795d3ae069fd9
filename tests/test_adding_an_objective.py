# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/adding_an_objective.md, applied to a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import CACHE, REPOSITORY


@pytest.fixture
def package(tmp_path):
    """A copy of the package with the page's file written and its changes applied."""
    page = (REPOSITORY / "docs" / "adding_an_objective.md").read_text()
    shutil.copytree(
        REPOSITORY / "llm_jepa_jax", tmp_path / "llm_jepa_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    ((name, code),) = re.findall(r"<!-- (\S+) -->\n```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / name).write_text(code)
    for change in re.findall(r"```diff\n--- a/(\S+)\n.*?\n(@@.*?)```", page, re.DOTALL):
        apply(tmp_path / change[0], change[1])
    return tmp_path


def apply(path, hunks):
    """Replaces each hunk's old lines, which stand in the file once, by its new ones."""
    for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        text = path.read_text()
        assert text.count(old) == 1, f"{path.name}: the page is behind:\n{old}"
        path.write_text(text.replace(old, new))


def test_the_worked_example_trains(package):
    argv = [
        sys.executable, "-m", "llm_jepa_jax.main", f"--config={REPOSITORY}/configs/tiny.py:smoke",
        f"--workdir={package}/run", "--config.objective.uniformity.weight=0.1", "--config.train.num_steps=2",
        "--config.log.report=False", "--config.log.tensorboard=False", "--config.eval.final_examples=2",
        "--config.eval.max_new_tokens=2", f"--config.train.compile_cache={CACHE}",
        "--config.objective.jepa.dropout=0.0", "--config.objective.vicreg.weight=0.0",
    ]  # fmt: skip
    flags = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(package)}
    done = subprocess.run(argv, cwd=package, env=flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (package / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["uniformity_loss"] for line in lines if "uniformity_loss" in line]
    assert len(losses) == 2 and all(-10 < loss < 0 for loss in losses)
    parts = subprocess.run(
        [*argv, "--config.train.micro_batches=2"], cwd=package, env=flags, capture_output=True, text=True, timeout=300
    )
    assert parts.returncode == 2 and "`objective.uniformity.weight`=0.1 needs all pairs" in parts.stderr
