# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/adding_a_model.md, applied to a copy of the package and its tests."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import CACHE, REPOSITORY
from tests.test_adding_an_objective import apply

READS = """
import importlib.util
import jax.numpy as jnp
from llm_jepa_jax.config import freeze
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.models.families.registry import family_of, read_model
from llm_jepa_jax.models.transformer import abstract_params, count_params
spec = importlib.util.spec_from_file_location("preset", "configs/stablelm_2_1_6b.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = freeze(module.get_config()).model
family = family_of(model)
print(family.model_type, count_params(abstract_params(model, jnp.float32)[0]))
try:
    read_model("config.json", family.write(model) | {"use_parallel_residual": True})
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy with the page's files written and its changes applied."""
    copy, page = tmp_path_factory.mktemp("copy"), (REPOSITORY / "docs" / "adding_a_model.md").read_text()
    for name in ("llm_jepa_jax", "tests", "configs"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    files = re.findall(r"<!-- (\S+) -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(files) == 3
    for name, code in files:
        (copy / name).write_text(code)
    changes = re.findall(r"```diff\n--- a/(\S+)\n.*?\n(@@.*?)```", page, re.DOTALL)
    assert len(changes) == 2
    for name, hunks in changes:
        apply(copy / name, hunks)
    return copy


def start(package, *arguments):
    flags = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(package), "LLM_JEPA_TEST_CACHE": str(CACHE)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=package, env=flags, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_family_reads_its_preset_and_refuses_what_it_does_not_know(package):
    first, second = start(package, "-c", READS).splitlines()
    published = re.search(r"this one's are ([\d,]+)", (REPOSITORY / "docs" / "adding_a_model.md").read_text())
    assert first == f"stablelm {published[1].replace(',', '')}"
    assert second == ("config.json: `use_parallel_residual` is True, which is not supported; use a model with False")


@pytest.mark.parity
def test_the_worked_example_equals_transformers(package):
    """By the tests that the page names, and by its own comparison of layers."""
    pytest.importorskip("torch")
    words = start(package, "-m", "pytest", "-q", "-m", "parity", "tests/test_hf_parity.py", "-k", "stablelm", "-n0")
    assert "4 passed" in words
    make = "from tests.hf_models import make_model; make_model('stablelm').save_pretrained('small')"
    start(package, "-c", make)
    lines = start(package, "compare.py", "small").splitlines()
    assert [line.split(":")[0] for line in lines] == [f"layer {layer}" for layer in range(4)]
    assert all(float(re.search(r": (\S+),", line)[1]) < 1e-5 for line in lines)
