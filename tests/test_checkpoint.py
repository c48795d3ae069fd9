# SPDX-License-Identifier: Apache-2.0
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jepa_jax.checkpoint.manager import Checkpoints, restore_params
from llm_jepa_jax.config import CheckpointConfig
from llm_jepa_jax.errors import UserError


def sharding(devices, *spec):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*spec))


def state(step, devices=8):
    rng = np.random.default_rng(step)
    return {
        "params": {"w": jax.device_put(rng.normal(size=(16, 24)).astype(np.float32), sharding(devices, "fsdp"))},
        "opt_state": {
            "mu": jax.device_put(rng.normal(size=(16, 24)).astype(np.float32), sharding(devices, None, "fsdp"))
        },
        "step": jax.device_put(np.int32(step), sharding(devices)),
    }


def abstract(devices):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, devices))


def saved(directory, steps, config=None, scores=None):
    checkpoints = Checkpoints(directory / "checkpoints", config or CheckpointConfig(keep_last=9))
    for step in steps:
        checkpoints.save(step, state(step), {"step": step, "window": {"a": 0.1}}, (scores or {}).get(step))
        checkpoints.wait()
    checkpoints.close()


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_restores_bit_equal_on_any_number_of_devices(tmp_path, devices):
    saved(tmp_path, [3, 5])
    step, restored, meta = Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore_latest(abstract(devices))
    assert step == 5 and meta == {"step": 5, "window": {"a": 0.1}}
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, state(5)))
    assert restored["params"]["w"].sharding == sharding(devices, "fsdp")
    number, params = restore_params(tmp_path / "checkpoints", abstract(devices)["params"], step=3)
    assert number == 3
    np.testing.assert_array_equal(params["w"], state(3)["params"]["w"])


def empty(step_directory: pathlib.Path):
    shutil.rmtree(step_directory)
    step_directory.mkdir()


def truncate(step_directory: pathlib.Path):
    for path in step_directory.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(step_directory: pathlib.Path):
    for path in (step_directory / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(bytes(path.stat().st_size))


def lose_meta(step_directory: pathlib.Path):
    shutil.rmtree(step_directory / "meta")


@pytest.mark.parametrize("damage", [empty, truncate, zero, lose_meta])
def test_damaged_checkpoints_are_skipped_loudly_and_kept_aside(tmp_path, caplog, damage):
    saved(tmp_path, [3, 5])
    damage(tmp_path / "checkpoints" / "5")
    number, params = restore_params(tmp_path / "checkpoints", abstract(8)["params"])
    if damage is not lose_meta:  # parameters alone do not need it
        assert number == 3
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep_last=9))
    step, restored, _ = checkpoints.restore_latest(abstract(8))
    assert step == 3 and "5 IS DAMAGED AND SKIPPED" in caplog.text
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, state(3)))
    assert (tmp_path / "invalid_checkpoints" / "5-0").is_dir()
    checkpoints.save(5, state(5), {"step": 5}, None)
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore_latest(abstract(8))
    assert again[0] == 5


def test_nothing_valid_means_none(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore_latest(abstract(1)) is None
    saved(tmp_path, [3])
    empty(tmp_path / "checkpoints" / "3")
    assert Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore_latest(abstract(1)) is None
    with pytest.raises(UserError, match="no checkpoint"):
        restore_params(tmp_path / "checkpoints", abstract(1)["params"])


def test_keeps_the_last_and_the_best(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.6, 6: 0.1}
    saved(tmp_path, [1, 2, 3, 4, 5, 6], CheckpointConfig(keep_last=2, keep_best=1), scores)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [2, 5, 6]
    other = tmp_path / "other"
    saved(other, [1, 2, 3], CheckpointConfig(keep_last=1, keep_best=0), {1: 0.9})
    assert [p.name for p in (other / "checkpoints").iterdir() if p.name.isdigit()] == ["3"]


def test_arrays_are_copied_before_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    first = state(1)
    expected = jax.tree.map(np.array, first)
    checkpoints.save(1, first, {}, None)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0)(first)
    checkpoints.close()
    _, restored, _ = Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore_latest(abstract(8))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, restored), expected)


NO_SPACE = """
import pathlib, resource, signal, sys
import jax.numpy as jnp
from llm_jepa_jax.checkpoint.manager import Checkpoints
from llm_jepa_jax.config import CheckpointConfig
from llm_jepa_jax.errors import UserError
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), CheckpointConfig())
checkpoints.save(1, {"w": jnp.arange(10.0)}, {}, None)
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = jnp.sin(jnp.arange(1_000_000.0) ** 2)
try:
    checkpoints.save(2, {"w": noise}, {}, None)
    checkpoints.wait()
except UserError as error:
    print("REFUSED", error)
"""


def test_no_room_is_one_line_and_leaves_the_earlier_checkpoint(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", NO_SPACE, str(tmp_path / "checkpoints")], capture_output=True, text=True, timeout=120
    )
    assert "REFUSED" in result.stdout and "cannot write a checkpoint" in result.stdout, result.stderr[-2000:]
    one = {"params": jax.ShapeDtypeStruct((10,), jnp.float32, sharding=sharding(1))}
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    step, restored, _ = checkpoints.restore_latest({"w": one["params"]})
    assert step == 1
    np.testing.assert_array_equal(restored["w"], np.arange(10.0))
