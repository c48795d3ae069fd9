# SPDX-License-Identifier: Apache-2.0
"""Eight simulated devices, one shared compile cache, and the reference data where it is present."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import chex
import jax
import pytest

chex.set_n_cpu_devices(8)
CACHE = pathlib.Path(
    os.environ.get("LLM_JEPA_TEST_CACHE", pathlib.Path.home() / ".cache" / "llm_jepa_jax" / "test_xla")
)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """Reference values and data sets, which live outside the project: LLM_JEPA_SHARED or ../shared."""
    path = pathlib.Path(os.environ.get("LLM_JEPA_SHARED", REPOSITORY.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"reference data not found at {path}; set LLM_JEPA_SHARED to its directory")
    return path
