# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/adding_a_model.md is what the repository has, and its scripts run."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import CACHE, REPOSITORY
from tests.test_adding_an_objective import apply

FILE = r"<!-- (\S+) -->\n```python\n(.*?)```"
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
def page():
    return (REPOSITORY / "docs" / "adding_a_model.md").read_text()


@pytest.fixture(scope="module")
def written(page, tmp_path_factory):
    """A directory with the page's files that the repository does not have."""
    directory = tmp_path_factory.mktemp("page")
    (directory / "configs").mkdir()
    for name, code in re.findall(FILE, page, re.DOTALL):
        if not (REPOSITORY / name).exists():
            (directory / name).write_text(code)
    return directory


def test_the_page_is_what_the_repository_has(page, tmp_path):
    """The family's file as it is; and with the page's changes taken back and made again, the other files too."""
    files = dict(re.findall(FILE, page, re.DOTALL))
    assert len(files) == 3
    family = "llm_jepa_jax/models/families/stablelm.py"
    assert files[family] == (REPOSITORY / family).read_text()
    changes = re.findall(r"```diff\n--- a/(\S+)\n.*?\n(@@.*?)```", page, re.DOTALL)
    assert len(changes) == 2
    for name, hunks in changes:
        now, copy = (REPOSITORY / name).read_text(), tmp_path / "copy.py"
        copy.write_text(now)
        apply(copy, re.sub(r"^[+-]", lambda sign: "-+"["+-".index(sign[0])], hunks, flags=re.MULTILINE))
        assert copy.read_text() != now
        apply(copy, hunks)
        assert copy.read_text() == now


def start(directory, *arguments):
    flags = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY), "LLM_JEPA_TEST_CACHE": str(CACHE)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=directory, env=flags, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_family_reads_its_preset_and_refuses_what_it_does_not_know(page, written):
    published = re.search(r"this one's are ([0-9,]+)", page)[1].replace(",", "")
    first, second = start(written, "-c", READS).splitlines()
    assert first == f"stablelm {published}"
    assert second == ("config.json: `use_parallel_residual` is True, which is not supported; use a model with False")


@pytest.mark.parity
def test_the_comparison_of_layers_equals_transformers(written):
    pytest.importorskip("torch")
    make = "from tests.hf_models import make_model; make_model('stablelm').save_pretrained('small')"
    start(written, "-c", make)
    lines = start(written, "compare.py", "small").splitlines()
    assert [line.split(":")[0] for line in lines] == [f"layer {layer}" for layer in range(4)]
    assert all(float(re.search(r": (\S+),", line)[1]) < 1e-5 for line in lines)
