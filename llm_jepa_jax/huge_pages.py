# SPDX-License-Identifier: Apache-2.0
"""Memory settings of the C library that CPU training wants; they are read only when a process starts."""

import os
import sys

SETTINGS = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
"""Transparent huge pages, and memory that stays with the process: XLA:CPU takes its temporary memory anew every step,
and faulting it in cost a training step 1.3 times its time with pages of 4 KiB."""


def use_huge_pages() -> None:
    """Starts the program again with these settings, on Linux and unless GLIBC_TUNABLES is set already."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = SETTINGS
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
