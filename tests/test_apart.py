# SPDX-License-Identifier: Apache-2.0
"""What runs in a process of its own: results and errors come back, and a process that dies is told."""

import os
import sys

import pytest

from llm_jepa_jax.errors import UserError
from llm_jepa_jax.plan.apart import Died, apart


def double(value):
    return 2 * value


def refuse(words):
    raise UserError(words)


def give_up(line):
    print(f"E1126 06:22:54 1 a.cc:1] before\n{line}\nand its stack", file=sys.stderr, flush=True)
    os.abort()


def test_what_is_returned_and_raised_comes_back():
    assert apart(double, [1]) == [1, 1]
    with pytest.raises(UserError, match="^not so$"):
        apart(refuse, "not so")


def test_a_process_that_aborts_is_told_by_its_fatal_line(capfd):
    with pytest.raises(Died, match="^SIGABRT: Check failed: a == b$"):
        apart(give_up, "F1126 06:22:54.782054   13926 partitioner.cc:497] Check failed: a == b")
    with pytest.raises(Died, match="^exit code 3$"):
        apart(os._exit, 3)
    assert not capfd.readouterr().err
