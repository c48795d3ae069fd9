# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, refuse, are slow or fail now and then: the run goes on, and ends as if nothing had been."""

import ctypes
import os
import re
import resource
import shutil
import subprocess

import pytest

from tests.conftest import REPOSITORY
from tests.faults.runs import EVERY, NUM_STEPS, end, last_step, log_of, outcome, saved_steps, start, wait

pytestmark = pytest.mark.faults
CAPBSET_DROP, DAC_OVERRIDE = 24, 1
"""Of prctl(2) and capabilities(7)."""


def as_others():
    """Root too is held to permissions then."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None, use_errno=True).prctl(CAPBSET_DROP, DAC_OVERRIDE, 0, 0, 0) == 0


def not_written(workdir):
    return len(re.findall("IS NOT WRITTEN", log_of(workdir).read_text()))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert end(start(workdir)) == 0, log_of(workdir).read_text()[-3000:]
    return outcome(workdir)


def test_a_full_disk(expected, tmp_path, ledger):
    """No file may grow beyond a few pages for a while: checkpoints cannot, nor can the metrics."""
    workdir = tmp_path / "run"
    process = start(workdir)
    wait(lambda: last_step(workdir) > 2 * EVERY, process)
    before = saved_steps(workdir)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    wait(lambda: not_written(workdir) >= 2, process)
    assert before and saved_steps(workdir)[-1] >= before[-1], "the last good one stays"
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert end(process) == 0, log_of(workdir).read_text()[-3000:]
    failed, same = not_written(workdir), outcome(workdir) == expected
    ledger.add("full disk", injected=failed, survived=failed, data_lost=not same)
    assert same and not list((workdir / "checkpoints").glob("*tmp*"))


def test_a_directory_that_is_read_only(expected, tmp_path, ledger):
    workdir = tmp_path / "run"
    process = start(workdir, preexec=as_others)
    wait(lambda: last_step(workdir) > 2 * EVERY, process)
    (workdir / "checkpoints").chmod(0o555)
    wait(lambda: not_written(workdir) >= 2, process)
    (workdir / "checkpoints").chmod(0o755)
    assert end(process) == 0, log_of(workdir).read_text()[-3000:]
    failed, same = not_written(workdir), outcome(workdir) == expected
    ledger.add("read-only directory", injected=failed, survived=failed, data_lost=not same)
    assert "Permission denied" in log_of(workdir).read_text() and same


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler for tests/faults/disk.c")
def test_a_slow_disk_that_fails_now_and_then(expected, tmp_path, ledger):
    library, workdir, broken = tmp_path / "disk.so", tmp_path / "run", tmp_path / "broken"
    source = str(REPOSITORY / "tests" / "faults" / "disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"], check=True)
    disk = {
        "LD_PRELOAD": str(library), "DISK_PLACE": str(workdir / "checkpoints"), "DISK_MILLISECONDS": "10",
        "DISK_ONE_IN": "60", "DISK_BROKEN": str(broken),
    }  # fmt: skip
    process = start(workdir, extra=disk)
    wait(lambda: last_step(workdir) > 2 * EVERY, process)
    broken.touch()
    wait(lambda: not_written(workdir) >= 2, process)
    broken.unlink()
    assert end(process) == 0, log_of(workdir).read_text()[-3000:]
    failed, same = not_written(workdir), outcome(workdir) == expected
    ledger.add("slow, failing disk", injected=failed, survived=failed, data_lost=not same)
    assert same and saved_steps(workdir)[-1] == NUM_STEPS
