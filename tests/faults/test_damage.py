# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints: an older one is used, or what is read is what was saved."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jepa_jax.checkpoint.checksums import describe
from llm_jepa_jax.checkpoint.manager import Checkpoints, restore_params
from llm_jepa_jax.config import CheckpointConfig
from llm_jepa_jax.parallel.mesh import make_mesh
from llm_jepa_jax.train.state import state_factory
from tests.conftest import small_config

pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # of reads after the failed one
]
CONFIG = CheckpointConfig(keep_last=9)
ROUNDS = 3


def flip(content, draw):
    place, bit = draw.integers(len(content)), draw.integers(8)
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def flip_in_every_kilobyte(content, draw):
    for start in range(0, len(content), 1024):
        content = content[:start] + flip(content[start : start + 1024], draw) + content[start + 1024 :]
    return content


def truncate(content, draw):
    return content[: draw.integers(len(content))]


def empty(content, draw):
    return b""


def zero(content, draw):
    return bytes(len(content))


def exchange(content, draw):
    """Two equal parts in each other's place: the bytes are those of before."""
    size = len(content) // 4
    return content[size : 2 * size] + content[:size] + content[2 * size :]


def lose(content, draw):
    return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints 3 and 5 of a real state, and what they hold."""
    directory, cache = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("cache")
    config = small_config(cache, mesh={"fsdp": 8})
    factory = state_factory(config, make_mesh(config.mesh), 4)
    checkpoints, holds = Checkpoints(directory / "checkpoints", CONFIG), {}
    for step in (3, 5):
        state = factory.create()
        keys = iter(jax.random.split(jax.random.key(step), 200))
        noise = [
            jax.random.normal(next(keys), leaf.shape, leaf.dtype) if leaf.dtype == jnp.float32 else leaf + step
            for leaf in jax.tree.leaves(state)
        ]
        state = jax.device_put(jax.tree.unflatten(jax.tree.structure(state), noise), factory_shardings(factory))
        holds[step] = describe(state)
        checkpoints.save(step, state, {"step": step, "window": {"a": step / 3}})
    checkpoints.close()
    return directory, factory, holds


def factory_shardings(factory):
    return jax.tree.map(lambda leaf: leaf.sharding, factory.abstract)


@pytest.mark.parametrize("damage", [flip, flip_in_every_kilobyte, truncate, empty, zero, exchange, lose])
def test_damage_of_any_file_is_seen_or_does_not_matter(saved, tmp_path, damage, ledger):
    directory, factory, holds = saved
    draw = np.random.default_rng()
    files = [
        path.relative_to(directory) for path in (directory / "checkpoints" / "5").rglob("*")
        if path.is_file() and path.stat().st_size
    ]  # fmt: skip
    seen, kind = 0, f"damage: {damage.__name__.replace('_', ' ')}"
    for file in files * (ROUNDS if damage is flip else 1):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)
        content = damage((copy / file).read_bytes(), draw)
        if content is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(content)
        number, params = restore_params(copy / "checkpoints", factory.abstract.params)
        found = describe({"params": params})
        assert all(holds[number][name] == words for name, words in found.items()), f"{damage.__name__} {file}: silent"
        step, state, meta = Checkpoints(copy / "checkpoints", CONFIG).restore_latest(factory.abstract)
        same = describe(state) == holds[step] and meta == {"step": step, "window": {"a": step / 3}}
        ledger.add(kind, survived=same, steps_lost=5 - step, data_lost=not same)
        assert same, f"{damage.__name__} {file}: silent"
        assert (step == 3) == (copy / "invalid_checkpoints" / "5-0").is_dir()
        seen += step == 3
    ledger.note(f"{kind}: {seen} seen, the others without effect")
    assert seen
