"""Several processes as one program: joining them, agreeing on numbers, and ending together.

Each process drives its own devices and runs the same code; JAX's collectives connect them. Anything
that decides what runs next (a signal, the step to resume from, a fault) must therefore be known to
all of them at the same point. With a single process everything here is free.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsjax.parallel import lifeline

# Variables by which JAX finds the other processes by itself, and the one that counts them.
_CLUSTERS = {
    "Slurm": (
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
        "SLURM_NTASKS",
    ),
    "Open MPI": (("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_SIZE"),
}
# After this long without a heartbeat from a process JAX ends the others. It covers a process that
# vanishes without closing its connections, which `lifeline` cannot notice. JAX's default is 100.
_HEARTBEAT_SECONDS = 30
_GRACE_SECONDS = 5.0  # for a failing process to print why
_ADDRESS_BYTES = 512


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> Iterator[None]:
    """Context in which this process is one of `count`; no JAX computation may have run before.

    Without arguments the cluster's variables count (Slurm, Open MPI, TPUs on GKE); outside a
    cluster, and with a single process, nothing happens. If another process ends before all have
    left the context, this one says so and ends too.

    Args:
      coordinator: HOST:PORT at which process 0 listens and the others reach it.
      index: this process's number, from 0.

    Raises:
      ValueError: some of the arguments are missing or do not fit each other.
      OSError: the processes cannot find each other.
    """
    if not _initialize(coordinator, count, index):
        yield
        return
    line = _tie(coordinator.rpartition(":")[0] if coordinator else None)
    try:
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Perhaps a collective failed because another process ended; `_leave` then says so.
            time.sleep(_GRACE_SECONDS)
        _leave_soon(error.code if isinstance(error, SystemExit) else 1)
        raise
    if line is not None:
        line.release()
    wait("all are done")
    if line is not None:
        line.close()
    jax.distributed.shutdown()


def is_first() -> bool:
    """Returns whether this is process 0, which writes what there shall be one copy of."""
    return jax.process_index() == 0


def wait(place: str) -> None:
    """Returns when every process has reached this place."""
    multihost_utils.sync_global_devices(place)


def from_first(number: int) -> int:
    """Returns process 0's number on all processes."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def json_from_first(value: Any) -> Any:
    """Returns process 0's JSON value on all processes; what the others give is not read."""
    if jax.process_count() == 1:
        return value
    own = json.dumps(value).encode() if is_first() else b""
    own = own.ljust(from_first(len(own)), b"\0")
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(own, np.uint8))
    return json.loads(np.asarray(sent).tobytes())


def highest(number: int) -> Any:
    """Returns the highest of the processes' numbers, an int32 scalar.

    It is computed in order with the other programs; nothing waits for it until it is read.
    """
    if jax.process_count() == 1:
        return np.int32(number)
    sharding, compute = _highest()
    shape = (jax.device_count(),)
    own = np.full(1, number, np.int32)
    return compute(jax.make_array_from_callback(shape, sharding, lambda index: own))


@functools.cache
def _highest() -> tuple[NamedSharding, Any]:
    mesh = Mesh(np.asarray(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.max, out_shardings=everywhere)


def check_same(facts: Mapping[str, Any]) -> None:
    """Checks that all processes have been given the same values.

    Args:
      facts: by name, values that differ if their `repr` does.

    Raises:
      ValueError: names the values that differ and the processes that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    own = np.array([zlib.crc32(repr(fact).encode()) for fact in facts.values()], np.uint32)
    all_PX = np.asarray(multihost_utils.process_allgather(own))
    differs_PX = all_PX != all_PX[:1]
    if differs_PX.any():
        named = [
            f"{name} of process {', '.join(map(str, np.flatnonzero(differs_P)))}"
            for name, differs_P in zip(facts, differs_PX.T, strict=True)
            if differs_P.any()
        ]
        raise ValueError(
            f"{' and '.join(named)} is not that of process 0; start every process with the same "
            "arguments, the same code and the same files"
        )


def _initialize(coordinator: str | None, count: int | None, index: int | None) -> bool:
    """Joins the other processes; returns False if there are none."""
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(given.keys() - set(missing))} needs {' and '.join(missing)} too; give "
            "all three, or none where Slurm, Open MPI or GKE starts the processes"
        )
    if count is None or index is None:
        if not _in_cluster():
            return False
        with _joining("the cluster's processes"):
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
        return True
    if not 0 <= index < count:
        raise ValueError(
            f"--process-id={index} must be at least 0 and below --num-processes={count}"
        )
    if count == 1:
        return False
    with _joining(f"the {count} processes at {coordinator}"):
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    return True


def _in_cluster() -> bool:
    """Returns whether a launcher that JAX knows has started several processes."""
    for needed, count in _CLUSTERS.values():
        if all(name in os.environ for name in needed):
            return int(os.environ.get(count, "1")) > 1
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1


@contextlib.contextmanager
def _joining(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(
            f"cannot join {what}: {' '.join(str(error).split())[:300]}; check that all of them "
            "were started and that the first one's port can be reached from everywhere"
        ) from error


def _tie(host: str | None) -> lifeline.First | lifeline.Other | None:
    """Connects this process to process 0.

    Args:
      host: at which process 0 can be reached; None: the name it gives itself.

    Returns:
      None, after a warning, if it cannot be reached.
    """
    first = lifeline.First(_leave) if is_first() else None
    address = np.zeros(_ADDRESS_BYTES, np.uint8)
    if first is not None:
        text = json.dumps([socket.gethostname(), first.port, first.token.hex()]).encode()
        address[: len(text)] = np.frombuffer(text, np.uint8)
    address = np.asarray(multihost_utils.broadcast_one_to_all(address)).astype(np.uint8)
    if first is not None:
        return first
    name, port, token = json.loads(address.tobytes().rstrip(b"\0"))
    try:
        return lifeline.Other(
            (host or name, port), bytes.fromhex(token), jax.process_index(), _leave
        )
    except OSError as error:
        print(
            f"process {jax.process_index()} cannot connect to {host or name}:{port} ({error}); "
            f"when a process ends, it will take {_HEARTBEAT_SECONDS} seconds to notice",
            file=sys.stderr,
        )
        return None


def _leave(gone: int) -> None:
    """Ends this process because another one has ended."""
    print(
        f"error: process {gone} of {jax.process_count()} has ended, and process "
        f"{jax.process_index()} cannot go on without it; what it printed last says why. Start all "
        f"{jax.process_count()} again with the same command: the run resumes from its newest "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(1)


def _leave_soon(code: Any) -> None:
    """Ends this process after a grace period, even if its threads wait for other processes."""

    def leave() -> None:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)

    timer = threading.Timer(_GRACE_SECONDS, leave)
    timer.daemon = True
    timer.start()
