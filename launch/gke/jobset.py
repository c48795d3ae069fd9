#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Starts a run on GKE's TPUs: fills in jobset.yaml and hands it to kubectl. Needs Python only; see docs/pods.md.

python launch/gke/jobset.py --name=NAME --topology=KIND:SHAPE --image=IMAGE [options] -- ARGUMENTS of llm_jepa_jax.main
"""

import argparse
import json
import math
import pathlib
import re
import shlex
import string
import subprocess
import sys
from typing import Any, NoReturn

HERE = pathlib.Path(__file__).resolve().parent
HOST_CHIPS = 4
LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def tpu_types() -> dict[str, dict[str, str]]:
    """The rows of tpu_types.tsv by kind; its last comment line names the columns."""
    lines = (HERE.parent / "tpu_types.tsv").read_text().splitlines()
    columns = [line for line in lines if line.startswith("#")][-1].removeprefix("# ").split("\t")
    rows = [dict(zip(columns, line.split("\t"), strict=True)) for line in lines if not line.startswith("#")]
    return {row["kind"]: row for row in rows}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the arguments behind `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        usage="%(prog)s --name=NAME --topology=KIND:SHAPE --image=IMAGE [options] -- ARGUMENTS of llm_jepa_jax.main",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet")
    add("--topology", required=True, help="v5p:4x4x4, as --mode=plan takes it")
    add("--image", required=True, help="built from launch/Dockerfile with EXTRA=tpu")
    add("--slices", type=int, default=1, help="slices of that topology (1)")
    add("--chips-per-host", type=int, help=f"of the node pool's machines ({HOST_CHIPS}, or all of a smaller slice)")
    add("--namespace", default="default")
    add("--service-account", default="default", help="Kubernetes' own, with access to the buckets")
    add("--queue", help="a Kueue LocalQueue; XPK's clusters have multislice-queue")
    add("--spot", action="store_true", help="on spot nodes")
    add("--claim", action="append", default=[], metavar="CLAIM:/PATH", help="mount a PersistentVolumeClaim; repeatable")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="of the run; repeatable")
    add("--max-restarts", type=int, default=20, help="preemptions count too (20)")
    add("--grace-seconds", type=int, default=600, help="from SIGTERM to SIGKILL (600)")
    add("--dry-run", action="store_true", help="print the manifest, start nothing")
    return parser.parse_args(argv[:end]), argv[end + 1 :]


def hosts_of(topology: str, chips_per_host: int | None) -> tuple[dict[str, str], str, int, int]:
    """Row of the kind, shape, hosts a slice and chips a host."""
    kind, _, shape = topology.partition(":")
    types = tpu_types()
    if kind not in types:
        fail(f"--topology={topology}: no such kind of TPU; one of {' '.join(types)}, such as v5p:4x4x4")
    dimensions = int(types[kind]["dimensions"])
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != dimensions:
        fail(f"--topology={topology}: {kind} has {dimensions} dimensions, such as {'x'.join(['4'] * dimensions)}")
    chips = math.prod(int(size) for size in shape.split("x"))
    each = chips_per_host or min(chips, HOST_CHIPS)
    if each < 1 or chips % each:
        fail(f"--topology={topology}: {chips} chips do not divide into hosts of {each}; set --chips-per-host")
    return types[kind], shape, chips // each, each


def literal(text: str) -> str:
    """Kubernetes expands `$(NAME)` in arguments and values; `$$` stands for one `$`."""
    return text.replace("$", "$$")


def check(options: argparse.Namespace, hosts: int, arguments: list[str]) -> None:
    longest = f"{options.name}-slice-{options.slices - 1}-{hosts - 1}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", options.name) or len(longest) > 63:
        fail(f"--name={options.name}: lower-case letters, digits and hyphens, a letter first, and {longest} within 63")
    for flag in ("namespace", "service_account", "queue"):
        value = getattr(options, flag)
        if value is not None and not re.fullmatch(LABEL, value):
            fail(f"--{flag.replace('_', '-')}={value}: lower-case letters, digits and hyphens are wanted")
    for flag, least in (("slices", 1), ("max_restarts", 0), ("grace_seconds", 1)):
        if getattr(options, flag) < least:
            fail(f"--{flag.replace('_', '-')}={getattr(options, flag)}: {least} at least")
    for argument in [*arguments, *options.env, *options.claim, options.image]:
        if re.search("[\ud800-\udfff]", argument):
            fail(f"{argument!r}: not UTF-8, which a manifest must be")
    for pair in options.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL | re.ASCII):
            fail(f"--env={pair}: NAME=VALUE is wanted")
    for claim in options.claim:
        if not re.fullmatch(LABEL + r":/[^:]*", claim):
            fail(f"--claim={claim}: CLAIM:/PATH is wanted")
    workdir = workdir_of(arguments)
    if re.match("gs://.", workdir):
        return
    if not workdir.startswith("/"):
        fail(
            f"--workdir={workdir}: a run goes on from its directory after a restart, so it must outlive the pods and "
            "be one for all of them; after `--`, pass --workdir=gs://BUCKET/DIR or with a path under a --claim"
        )
    inside = [claim.partition(":")[2].rstrip("/") + "/" for claim in options.claim]
    if not any(workdir.startswith(path) for path in inside):
        fail(f"--workdir={workdir}: lies in the pod and would go with it; mount its place with --claim=CLAIM:/PATH")


def workdir_of(arguments: list[str]) -> str:
    found = ""
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--workdir", "-workdir"):
            found = value if equals else following
    return found


def environment_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The user's variables; for several slices also what says which one a pod is in, and where the first pod is."""
    given: list[dict[str, Any]] = []
    if options.slices > 1:
        index = {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}
        given = [
            {"name": "MEGASCALE_NUM_SLICES", "value": str(options.slices)},
            {"name": "MEGASCALE_SLICE_ID", "valueFrom": index},
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": f"{options.name}-slice-0-0.{options.name}"},
        ]
    for pair in options.env:
        name, _, value = pair.partition("=")
        given.append({"name": name, "value": literal(value)})
    return given


def scalar(value: Any) -> str:
    """JSON that every YAML reader takes for the same value: no surrogate pairs, no bare line separators."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found.group()):04x}", text)


def render(options: argparse.Namespace, arguments: list[str]) -> str:
    """The manifest."""
    row, shape, hosts, chips_per_host = hosts_of(options.topology, options.chips_per_host)
    check(options, hosts, arguments)
    selector = {"cloud.google.com/gke-tpu-accelerator": row["gke"], "cloud.google.com/gke-tpu-topology": shape}
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    # Data workers pass batches through shared memory; containers have 64 MiB of it by default.
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for number, claim in enumerate(options.claim):
        source, _, path = claim.partition(":")
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": source}})
        mounts.append({"name": f"claim-{number}", "mountPath": path})
    values = {
        "name": options.name, "namespace": options.namespace, "service_account": options.service_account,
        "labels": {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {},
        "max_restarts": options.max_restarts, "grace_seconds": options.grace_seconds, "slices": options.slices,
        "hosts": hosts, "chips_per_host": chips_per_host, "node_selector": selector, "tolerations": tolerations,
        "image": options.image, "arguments": [literal(argument) for argument in arguments],
        "environment": environment_of(options), "volumes": volumes, "mounts": mounts,
    }  # fmt: skip
    lines = (HERE / "jobset.yaml").read_text().splitlines(keepends=True)
    template = string.Template("".join(line for line in lines if not line.lstrip().startswith("#")))
    return template.substitute({name: scalar(value) for name, value in values.items()})


def main() -> None:
    options, arguments = parse(sys.argv[1:])
    manifest = render(options, arguments)
    if options.dry_run:
        print(manifest, end="")
        return
    command = ["kubectl", "apply", f"--namespace={options.namespace}", "--filename=-"]
    print(manifest, end="", file=sys.stderr)
    print(f"+ {shlex.join(command)}", file=sys.stderr)
    try:
        subprocess.run(command, input=manifest, text=True, check=True)
    except FileNotFoundError:
        fail("kubectl was not found; install it, or apply what --dry-run prints")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
