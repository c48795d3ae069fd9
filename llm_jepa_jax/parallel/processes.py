# SPDX-License-Identifier: Apache-2.0
"""Several processes as one program: who they are, a roll call that names who is missing, and barriers.

Explicit flags or environment variables say who a process is; else Slurm, Open MPI, TPU metadata, or a Kubernetes job
does, as JAX reads them. JAX itself ends a process without a word of use where another one does not come, so a roll call
over the coordinator's port comes first: only when all have answered does JAX take the port over.
"""

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jepa_jax.errors import TRY_AGAIN, TryAgainError, UserError

LOG = logging.getLogger("llm_jepa_jax")
ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID",
}  # fmt: skip
"""Where a flag that is not given is looked for."""
HEARTBEAT_SECONDS = 40
"""A process that is not heard of for so long is taken for dead, and the others stop."""
RETRY_SECONDS, HELLO_SECONDS = 0.2, 5.0
GONE_WORDS = (
    "Gloo", "Connection closed by peer", "Connection reset", "Socket closed", "heartbeat", "coordination service",
    "UNAVAILABLE", "DEADLINE_EXCEEDED",
)  # fmt: skip
"""What JAX says where another process does not answer any more."""
SHOWN = 8
"""How many processes an error lists."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """Which of several processes this is."""

    coordinator: str
    """`HOST:PORT` of process 0."""
    count: int
    index: int


@contextlib.contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> Iterator[None]:
    """Joins the other processes, if there are any, within `timeout` seconds; before JAX looks for devices.

    All three arguments, or none: then the environment says who this process is. `num_processes=1` asks nothing. Only
    process 0 writes text, errors aside, and it names the hosts of all. Where the block fails, the program ends without
    waiting for the others, as they may be waiting for this process.

    Raises:
        UserError: arguments are missing or contradict each other.
        TryAgainError: processes do not come in time (named), or one is gone.
    """
    start(coordinator, num_processes, process_id, timeout)
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        gone = isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in GONE_WORDS)
        again = gone or isinstance(error, TryAgainError)
        atexit.register(os._exit, TRY_AGAIN if again else 2 if isinstance(error, UserError | OSError) else 1)
        if not gone:
            raise
        raise TryAgainError(
            f"process {jax.process_index()} of {jax.process_count()} stops: another one is gone "
            f"({' '.join(str(error).split())[:200]}); see the others' logs; started again, all go on from the last "
            "checkpoint"
        ) from error


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float) -> None:
    """Joins the other processes; see `joined`."""
    rank = _rank(coordinator, num_processes, process_id, timeout)
    if rank is None or jax.distributed.is_initialized():
        return
    hosts = roll_call(rank, socket.gethostname(), timeout)
    jax.distributed.initialize(
        rank.coordinator, rank.count, rank.index,
        initialization_timeout=int(timeout), heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )  # fmt: skip
    if rank.index:
        LOG.setLevel(logging.ERROR)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print too
    by_host = {host: [i for i, other in enumerate(hosts) if other == host] for host in hosts}
    LOG.info(
        "%d processes on %d hosts: %s",
        rank.count, len(by_host), "; ".join(f"{host} ({_some(indices)})" for host, indices in by_host.items()),
    )  # fmt: skip


def any_process(said: bool) -> bool:
    """Whether any process says so; all ask together."""
    if jax.process_count() == 1:
        return said
    with jax.transfer_guard("allow"):
        return bool(np.any(multihost_utils.process_allgather(np.array(said))))


def wait_for_all(name: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _rank(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float) -> Rank | None:
    """Who this process is; None: it is alone."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    known = {name: os.environ.get(ENVIRONMENT[name]) if value is None else value for name, value in given.items()}
    missing = [name for name, value in known.items() if value is None]
    if str(known["num_processes"]) == "1":
        return None
    if len(missing) == len(known):
        return _detected(timeout)
    if missing:
        names = ", ".join(f"--{name} (or {ENVIRONMENT[name]})" for name in missing)
        raise UserError(f"--{next(n for n in known if n not in missing)} is given, but not {names}; pass all three")
    try:
        rank = Rank(str(known["coordinator"]), int(known["num_processes"] or 0), int(known["process_id"] or 0))
    except ValueError as error:
        raise UserError(f"--num_processes and --process_id are whole numbers: {error}") from error
    host, _, port = rank.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={rank.coordinator}: pass HOST:PORT of process 0, such as 10.0.0.1:8476")
    if not 0 <= rank.index < rank.count:
        raise UserError(f"--process_id={rank.index} of --num_processes={rank.count}: use 0 to {rank.count - 1}")
    return rank


def _detected(timeout: float) -> Rank | None:
    """Who the cluster says that this process is, by the detection of `jax.distributed.initialize`."""
    from jax._src.clusters import ClusterEnv  # it has no public name, and the roll call needs what it finds

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
    except Exception as error:  # each cluster has types of its own
        words = " ".join(str(error).split())
        raise UserError(
            f"this cluster does not say which process this is ({type(error).__name__}: {words}); pass --coordinator, "
            "--num_processes and --process_id, or --num_processes=1 for a process on its own"
        ) from error
    address, count, index, _ = found
    return Rank(address, count, index) if address and count and count > 1 and index is not None else None


def roll_call(rank: Rank, host: str, timeout: float) -> list[str]:
    """The host names of all processes, by number, once all are here.

    Raises:
        TryAgainError: not all came in time: process 0 tells all who did.
        UserError: the coordinator's port is taken, or this is not one of its processes.
    """
    end = time.monotonic() + timeout
    answer = _ask_all(rank, host, end, timeout) if rank.index == 0 else _report(rank, host, end, timeout)
    if "error" in answer:
        raise (UserError if answer.get("wrong") else TryAgainError)(answer["error"])
    return answer["hosts"]


def _ask_all(rank: Rank, host: str, end: float, timeout: float) -> dict[str, Any]:
    """Process 0's part: waits for the others' names, and tells them all what came of it."""
    port = int(rank.coordinator.rpartition(":")[2])
    came: dict[int, tuple[str, socket.socket]] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_server(port, rank.count))
        except OSError as error:
            raise UserError(
                f"--coordinator={rank.coordinator}: port {port} is not free here: {error.strerror}"
            ) from error
        while len(came) < rank.count - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger at the door
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(min(left, HELLO_SECONDS))
                hello = json.loads(connection.makefile().readline())
                index, count = int(hello["index"]), int(hello["count"])
                if count == rank.count and 0 < index < count:
                    came[index] = (str(hello["host"]), connection)
                else:
                    words = f"process {index} of {count} is not one of process 0's {rank.count}"
                    _tell(connection, {"error": words, "wrong": True})
        hosts = {0: host} | {index: name for index, (name, _) in came.items()}
        answer = _verdict(rank, hosts, timeout)
        for _, connection in came.values():
            _tell(connection, answer)
    return answer


def _server(port: int, backlog: int) -> socket.socket:
    """Listens to IPv4 and, where there is one, IPv6."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def _verdict(rank: Rank, hosts: dict[int, str], timeout: float) -> dict[str, Any]:
    missing = [index for index in range(rank.count) if index not in hosts]
    if not missing:
        return {"hosts": [hosts[index] for index in range(rank.count)]}
    here = ", ".join(f"{index} on {hosts[index]}" for index in sorted(hosts)[:SHOWN])
    more = ", …" if len(hosts) > SHOWN else ""
    return {
        "error": f"{len(missing)} of {rank.count} processes did not come within {timeout:.0f} s: {_some(missing)}; "
        f"here are {here}{more}; see the logs of those missing, and whether their hosts reach {rank.coordinator}"
    }


def _tell(connection: socket.socket, words: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who has gone again will be missed soon enough
        connection.sendall(json.dumps(words).encode() + b"\n")


def _report(rank: Rank, host: str, end: float, timeout: float) -> dict[str, Any]:
    """Another process's part: says its name until process 0 answers."""
    name, _, port = rank.coordinator.rpartition(":")
    words = f"process {rank.index} had no answer from process 0 at {rank.coordinator} within {timeout:.0f} s"
    reason = "no time was left"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((name.strip("[]"), int(port)), timeout=left) as connection:
                _tell(connection, {"index": rank.index, "count": rank.count, "host": host})
                connection.settimeout(left + 2 * RETRY_SECONDS)
                answer = connection.makefile().readline()
            if answer:
                return json.loads(answer)
            reason = "it hung up: it has ended, or another process has this number too"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(RETRY_SECONDS)
    return {"error": f"{words} ({reason}); start it, and see whether its host can be reached from {host}"}


def _some(indices: list[int]) -> str:
    rest = f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
    return ", ".join(map(str, indices[:SHOWN])) + rest
