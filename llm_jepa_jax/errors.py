# SPDX-License-Identifier: Apache-2.0
"""The one exception for wrong user input."""


class UserError(Exception):
    """Wrong input: the message is one line that names the place, the value and what would be right.

    The command line prints the message alone and exits with code 2 (with the stack trace under `--debug`).
    """
