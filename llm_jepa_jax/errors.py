# SPDX-License-Identifier: Apache-2.0
"""What a run stops with in one line: wrong input, or machines that may do better next time."""


class UserError(Exception):
    """Wrong input: the message is one line that names the place, the value and what would be right.

    The command line prints the message alone and exits with code 2 (with the stack trace under `--debug`).
    """


class TryAgainError(Exception):
    """Nothing is wrong with the input, but other processes or machines failed: the same command may work.

    The command line prints the message alone and exits with `TRY_AGAIN`, on which launchers start the run again.
    """


TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h."""
