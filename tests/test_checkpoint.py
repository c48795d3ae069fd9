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

from llm_jepa_jax.checkpoint.checksums import describe
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
        checkpoints.save(step, state(step), {"step": step, "window": {"a": 0.1}})
        checkpoints.rate(step, (scores or {}).get(step))
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
    assert number == 3
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep_last=9))
    step, restored, _ = checkpoints.restore_latest(abstract(8))
    assert step == 3 and "5 IS DAMAGED AND SKIPPED" in caplog.text
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, state(3)))
    assert (tmp_path / "invalid_checkpoints" / "5-0").is_dir()
    checkpoints.save(5, state(5), {"step": 5})
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
    checkpoints.save(1, first, {})
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0)(first)
    checkpoints.close()
    _, restored, _ = Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore_latest(abstract(8))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, restored), expected)


def test_keeps_the_best_over_a_restart(tmp_path):
    saved(tmp_path, [1, 2], CheckpointConfig(keep_last=1, keep_best=1), {1: 0.9, 2: 0.1})
    saved(tmp_path, [3, 4], CheckpointConfig(keep_last=1, keep_best=1), {3: 0.2})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["1", "4"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_checksums_see_any_bit_and_no_mesh(kind):
    values = np.random.default_rng(0).integers(0, 2 if kind == "bool" else 100, (16, 24)).astype(jnp.dtype(kind))
    (words,) = describe({"w": jnp.asarray(values)}).values()
    assert words["dtype"] == kind and words["shape"] == [16, 24]
    for spec in (("fsdp",), (None, "fsdp"), ()):
        assert describe({"w": jax.device_put(values, sharding(8, *spec))}) == {"w": words}
    draw = np.random.default_rng(1)
    for _ in range(5):
        changed = values.copy()
        byte = draw.integers(changed.nbytes)
        changed.view(np.uint8).reshape(-1)[byte] ^= 1 if kind == "bool" else 1 << draw.integers(8)
        (other,) = describe({"w": jnp.asarray(changed)}).values()
        assert other["sum"][:8] != words["sum"][:8] and other["sum"][8:] != words["sum"][8:]
    swapped = values.copy()
    swapped[0, 0], swapped[15, 23] = not values[0, 0], values[0, 0]
    assert describe({"w": jnp.asarray(swapped)}) != describe({"w": jnp.asarray(swapped[::-1, ::-1])})


@pytest.mark.parametrize("verify", [True, False])
def test_a_flipped_bit_of_an_array_is_seen_by_its_checksum(tmp_path, caplog, verify):
    """Nothing else sees it: the file is as long as it was, and can be decoded."""
    config = CheckpointConfig(keep_last=9, verify=verify)
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    values = {step: np.random.default_rng(step).normal(size=(128, 128)).astype(np.float32) for step in (3, 5)}
    for step, array in values.items():
        checkpoints.save(step, {"w": jax.device_put(array, sharding(1))}, {})
    checkpoints.close()
    for path in (tmp_path / "checkpoints" / "5" / "state").rglob("d/*"):
        content = path.read_bytes()
        middle = len(content) // 2
        if len(content) > 20_000:  # not an index, which has checksums
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    wanted = {"w": jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=sharding(4, "fsdp"))}
    step, restored, _ = Checkpoints(tmp_path / "checkpoints", config).restore_latest(wanted)
    assert np.array_equal(restored["w"], values[step]) == verify
    if verify:
        assert step == 3 and "5 IS DAMAGED AND SKIPPED (Damage: the checksums of 1 arrays are wrong: w)" in caplog.text
    else:
        assert step == 5


def test_another_type_is_checked_before_it_is_rounded(tmp_path):
    saved(tmp_path, [3])
    wanted = jax.tree.map(
        lambda leaf: leaf.update(dtype=jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, abstract(8)
    )
    _, restored, _ = Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore_latest(wanted)
    assert restored["params"]["w"].sharding == sharding(8, "fsdp")
    np.testing.assert_array_equal(restored["params"]["w"], state(3)["params"]["w"].astype(jnp.bfloat16))


DISK = """
import pathlib, resource, sys
import jax.numpy as jnp
from llm_jepa_jax.checkpoint.checksums import describe
from llm_jepa_jax.checkpoint.manager import Checkpoints
from llm_jepa_jax.config import CheckpointConfig
from llm_jepa_jax.errors import UserError
directory = pathlib.Path(sys.argv[1])
noise = {"w": jnp.sin(jnp.arange(1_000_000.0) ** 2)}
checkpoints = Checkpoints(directory, CheckpointConfig(keep_last=1, keep_best=0, retry_seconds=0.0))
checkpoints.save(1, noise, {})
checkpoints.settle()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoints.save(2, noise, {})
checkpoints.save(3, noise, {})
try:
    checkpoints.finish(4, noise, {})
except UserError as error:
    print("REFUSED", error)
print(sorted(path.name for path in directory.iterdir()), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.finish(4, noise, {})
checkpoints.close()
print(sorted(path.name for path in directory.iterdir()))
"""


def test_a_full_disk_leaves_the_earlier_checkpoint_and_saving_goes_on_when_there_is_room(tmp_path):
    """A limit on the size of files stands for it."""
    result = subprocess.run(
        [sys.executable, "-c", DISK, str(tmp_path / "checkpoints")], capture_output=True, text=True, timeout=120
    )
    refused, full, empty = result.stdout.splitlines()
    assert refused.startswith("REFUSED") and "cannot write a checkpoint: " in refused, result.stderr[-2000:]
    assert full == "['1']" and empty == "['4']", result.stdout
    for step in (2, 3, 4):
        assert f"/{step} IS NOT WRITTEN (" in result.stderr
    assert "the last good one is 1; saving is tried again at the next save" in result.stderr
    one = jax.ShapeDtypeStruct((1_000_000,), jnp.float32, sharding=sharding(1))
    step, restored, _ = Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore_latest({"w": one})
    assert step == 4
    np.testing.assert_array_equal(restored["w"], jnp.sin(jnp.arange(1_000_000.0) ** 2))
