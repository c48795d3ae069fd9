# SPDX-License-Identifier: Apache-2.0
"""Points as jobs for others to run: lines for a shell that submit them. Every value arrives as it is."""

import hashlib
import re
import shlex
import sys
from collections.abc import Sequence

from llm_jepa_jax.main import REPOSITORY
from llm_jepa_jax.sweep.points import Point, command
from llm_jepa_jax.sweep.results import Outcome


def job_lines(outcome: Outcome, form: str, options: Sequence[str]) -> list[str]:
    """Lines that run or submit what a point lacks: training, then the evaluation on test records."""
    point = outcome.point
    stages = [] if outcome.result else [point.arguments]
    stages += [point.test_arguments] if point.test else []
    if form == "shell":
        return [" && ".join(shlex.join(command(arguments)) for arguments in stages)]
    if form == "slurm":
        return _slurm(point, stages, options)
    jobset = [sys.executable, str(REPOSITORY / "launch" / "gke" / "jobset.py"), f"--name={_job_name(point)}", *options]
    lines = [shlex.join([*jobset, "--", *stages[0]])]
    if len(stages) > 1:  # jobs there do not wait for each other
        lines.append("# its test evaluation is run by the sweep itself, once the job is done")
    return lines


def _slurm(point: Point, stages: list[list[str]], options: Sequence[str]) -> list[str]:
    name = [f"--job-name={_job_name(point)}", *options]
    script = str(REPOSITORY / "launch" / "slurm.sbatch")
    if len(stages) == 1:
        return [shlex.join(["sbatch", *name, script, *stages[0]])]
    first = shlex.join(["sbatch", "--parsable", *name, script, *stages[0]])
    second = shlex.join([*name, script, *stages[1]])
    return [f'job=$({first}) && sbatch "--dependency=afterok:$job" {second}']


def _job_name(point: Point) -> str:
    """What Kubernetes takes for a name: lower-case letters, digits and hyphens; told apart by a hash."""
    plain = re.sub(r"[^a-z0-9]+", "-", point.name.lower()).strip("-")[:30].strip("-")
    return f"s-{plain}-{hashlib.sha256(str(point.workdir.absolute()).encode()).hexdigest()[:6]}"
