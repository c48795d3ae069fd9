#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sets up what is missing, then runs a sweep: python launch/sweep.py --dir=DIR --spec=configs/sweeps/NAME.py [options]

Arguments go to `python -m llm_jepa_jax.sweep`, which --help describes; see docs/sweeps.md. Needs Python only.
"""

import os
import pathlib
import shlex
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    """With --dry-run nothing is set up: the commands are shown, and those of the points once .venv is there."""
    set_up = ["bash", str(REPOSITORY / "launch" / "setup.sh")]
    python = REPOSITORY / ".venv" / "bin" / "python"
    sweep = [str(python), "-m", "llm_jepa_jax.sweep", *sys.argv[1:]]
    dry_run = "--dry-run" in sys.argv[1:]
    for command in (set_up, sweep):
        print(
            shlex.join(command) if dry_run else f"+ {shlex.join(command)}", file=sys.stdout if dry_run else sys.stderr
        )
    if dry_run and not python.exists():
        return
    sys.stdout.flush()
    if not dry_run:
        code = subprocess.run(set_up, stdout=sys.stderr, check=False).returncode
        if code:
            sys.exit(code)
    os.execv(sweep[0], sweep)


if __name__ == "__main__":
    main()
