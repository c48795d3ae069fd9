# SPDX-License-Identifier: Apache-2.0
"""Eight simulated devices, one shared compile cache, small fixtures, and the reference data where it is present."""

import dataclasses
import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import chex
import jax
import numpy as np
import pytest

from llm_jepa_jax.batch import FIELDS, Batch
from llm_jepa_jax.config import Config, freeze
from llm_jepa_jax.data import synthetic
from llm_jepa_jax.data.pipeline import TrainData, make_train_data
from llm_jepa_jax.data.sources import open_splits
from llm_jepa_jax.data.views import Costs
from llm_jepa_jax.text.tokenizer import Tokenizer, train_tokenizer

# Compiling is most of the tests' work: without optimization it is a third. Inherited by the processes that tests start.
FAST_COMPILE = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # the first is removed later, and an unknown flag ends the process
    FAST_COMPILE += [
        "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_llvm_disable_expensive_passes=true",
    ]  # fmt: skip
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST_COMPILE])
chex.set_n_cpu_devices(8)
CACHE = pathlib.Path(
    os.environ.get("LLM_JEPA_TEST_CACHE", pathlib.Path.home() / ".cache" / "llm_jepa_jax" / "test_xla")
)
for key, value in (("jax_compilation_cache_dir", str(CACHE)), ("jax_persistent_cache_min_compile_time_secs", 0.2)):
    jax.config.update(key, value)
    os.environ[key.upper()] = str(value)  # so that the processes that tests start share what is compiled
# Tracing makes many objects that live on: collecting as often as by default is a sixth of its time.
gc.set_threshold(20_000, 20)

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SMALL_MODEL = {
    "vocab_size": 512, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "mlp_dim": 64, "max_positions": 512,
}  # fmt: skip


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


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    records, _ = synthetic.generate(300, 30)
    return train_tokenizer((message.content for record in records for message in record.messages), 512)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> pathlib.Path:
    """One place for the data caches of all tests that do not look into them."""
    return tmp_path_factory.mktemp("cache")


def small_config(cache_dir: pathlib.Path, **sections: dict) -> Config:
    """A configuration that trains in seconds; `sections` change it, such as `data={"layout": "padded"}`."""
    values = {
        "data": {
            "synthetic_train": 60, "synthetic_eval": 10, "row_length": 256, "rows_per_step": 8,
            "row_buckets": 1, "cache_dir": str(cache_dir),
        },
        "model": dict(SMALL_MODEL),
        "opt": {"warmup_steps": 2},
        "objective": {},
        "train": {"num_steps": 4, "num_epochs": 0},
    }  # fmt: skip
    for name, changes in sections.items():
        values.setdefault(name, {})
        for key, value in changes.items():
            if isinstance(value, dict):
                values[name].setdefault(key, {}).update(value)
            else:
                values[name][key] = value
    return freeze(values)


def small_data(config: Config, tokenizer: Tokenizer) -> TrainData:
    splits = open_splits(config.data, config.seed)
    return make_train_data(config, tokenizer, splits.train, splits.weights)


def host_batch(data: TrainData, step: int = 0) -> Batch:
    """A step's global batch as numpy arrays."""
    values = data.steps()[step]
    return Batch(**{name: values[name] for name in FIELDS})


def host_rows(data: TrainData) -> list[dict[str, np.ndarray]]:
    """Every row of the stream, one after the other, padding rows at its end included."""
    steps = [data.steps()[step] for step in range(data.num_steps)]
    return [{name: step[name][row] for name in FIELDS} for step in steps for row in range(len(step["tokens"]))]


def plain_costs(conversation: np.ndarray, views: np.ndarray, targets: np.ndarray, longest: np.ndarray) -> Costs:
    """Costs of examples with one pair each, that no span is drawn from."""
    none_N = np.zeros(len(conversation), np.int64)
    points_Nx4 = np.zeros((len(conversation), 4), np.int64)
    return Costs(conversation, targets, none_N + 1, views, none_N, none_N, longest, points_Nx4)


def replace_rows(batch: Batch, **changes: np.ndarray) -> Batch:
    return dataclasses.replace(batch, **changes)
