# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: layer order of imports, sizes, licence lines."""

import ast

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "llm_jepa_jax"
ORDER = (
    (
        "errors",
        "config",
        "batch",
        "presets",
        "from_json",
        "model_checks",
        "resolve",
        "flops",
        "huge_pages",
        "schema",
        "objective_config",
        "eval_config",
        "vocabulary",
        "lora_config",
        "resolve_lora",
    ),
    ("text", "parallel"),
    ("data", "models"),
    ("objectives",),
    ("checkpoint",),
    ("train",),
    ("eval",),
    ("analysis",),
    ("plan", "prepare"),
    ("run_directory", "named_models", "api", "modes", "publish", "verify", "analyze", "main", "sweep"),
)
"""A file imports from its own place or from places above it; those in one line do not import each other,
except in the first and the last."""
LAYER = {name: number for number, names in enumerate(ORDER) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def place(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_places(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llm_jepa_jax"):
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("llm_jepa_jax."))


def test_every_file_has_a_place():
    assert {place(path) for path in FILES} == set(LAYER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_up(path):
    here = place(path)
    for other in imported_places(ast.parse(path.read_text())):
        if other == here:
            continue
        same_line = LAYER[other] == LAYER[here]
        allowed = LAYER[other] < LAYER[here] or (same_line and LAYER[here] in (0, len(ORDER) - 1))
        assert allowed, f"{here} imports {other}, which is not above it"


def test_only_models_import_linen():
    users = {
        place(path) for path in FILES if "flax.linen" in path.read_text() or "flax import linen" in path.read_text()
    }
    assert users == {"models"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert text.count("\n") < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_package_files_are_empty_below_the_top():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert path.read_text() == "", path
