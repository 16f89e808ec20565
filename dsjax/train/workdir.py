"""The folder of a run: its lock, the config it belongs to, and the versions that wrote it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from dsjax import settings
from dsjax.config import TrainConfig
from dsjax.files import read_json, write_json

# Keys that a resumed run may change: they do not alter what has been trained so far. (Epochs do
# so only by way of train.steps.)
_FREE = (
    "data.cache_dir", "train.remat", "train.loss_chunk", "train.log_every", "train.eval_every",
    "train.eval_sequences", "train.checkpoint_every", "train.keep", "train.compare_every",
    "train.sample_tokens", "sft.epochs", "preference.epochs",
    "train.tensorboard", "train.wandb_project", "mesh.", "rollout_mesh.", "janus.cache_dir",
    "rl.log_samples", "rl.flat_after",
)  # fmt: skip
_PACKAGES = ("dsjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunConfig(Protocol):
    """What the parts common to all runs read of a config; any root with these fields will do."""

    @property
    def name(self) -> str: ...
    @property
    def train(self) -> TrainConfig: ...


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Context that creates `workdir` and locks it against other processes.

    The lock is the kernel's, so it ends with the process, even if that is killed.

    Raises:
      ValueError: another process holds the lock; names process and host. Or the folder is that of a
        checkpoint, as published or converted, whose files a run would replace; or it is a file.
      OSError: the folder cannot be created or written.
    """
    if (workdir / "config.json").is_file() and _is_of_checkpoint(workdir / "config.json"):
        raise ValueError(
            f"{workdir} holds a checkpoint, whose config.json and tokenizer a run would replace; "
            "use another --workdir"
        )
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is no folder; name another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise ValueError(
                f"{workdir} is in use by {holder}; wait until it has ended, stop it, or use "
                "another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def claim(workdir: Path, config: RunConfig) -> None:
    """Makes `workdir` the folder of this config's run, or checks that it already is.

    Writes config.json and versions.json. A folder without a finished step may be claimed by any
    config: a run that was refused, say for its data, can be corrected and started there again.

    Raises:
      ValueError: the folder holds a run of another config, or checkpoints of an unknown one.
      OSError: the folder cannot be created or written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    checkpoints, metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
    has_checkpoints = checkpoints.is_dir() and any(checkpoints.iterdir())
    has_steps = has_checkpoints or (metrics.is_file() and metrics.stat().st_size > 0)
    if path.is_file() and has_steps:
        _check_same_run(path, config)
    elif has_checkpoints:
        raise ValueError(
            f"{workdir} holds checkpoints but no config.json to say of which run they are; "
            "use another --workdir"
        )
    write_json(path, settings.to_dict(config))
    write_json(workdir / "versions.json", versions())


def check_shared(workdir: Path) -> None:
    """Checks that this process sees the folder that the first process has claimed.

    Raises:
      ValueError: it does not.
    """
    if not (workdir / "config.json").is_file():
        raise ValueError(
            f"process {jax.process_index()} finds no {workdir / 'config.json'}, which process 0 "
            "has just written; --workdir must be a folder that all processes see, on a network "
            "file system where they run on several machines"
        )


def _is_of_checkpoint(path: Path) -> bool:
    try:
        return settings.is_checkpoint(read_json(path))
    except ValueError as error:
        raise ValueError(f"{error}; use another --workdir") from error


def _check_same_run(path: Path, config: Any) -> None:
    try:
        stored = settings.flatten(settings.load_config(path, type(config)))
    except ValueError as error:
        raise ValueError(f"{error}; use another --workdir") from error
    asked = settings.flatten(config)
    differences = {
        key: (was, asked[key])
        for key, was in stored.items()
        if was != asked[key] and not key.startswith(_FREE)
    }
    if "train.steps" in differences and not asked["train.batch_size_start"]:
        # More steps only stretch the schedule from here on. With a batch ramp they would also
        # change the batch sizes of steps already done.
        before, now = differences["train.steps"]
        if now >= before:
            del differences["train.steps"]
    if differences:
        listed = "; ".join(
            f"{key} was {was!r} and is now {now!r}" for key, (was, now) in differences.items()
        )
        raise ValueError(
            f"{path.parent} holds a run of another config: {listed}. "
            "Use another --workdir, or set these keys back"
        )


def versions() -> dict[str, Any]:
    """Returns what decides a run's bits besides its config: versions, cores, flags, devices."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "nproc": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "commit": git_commit(Path(__file__).parent),
    }


def changed_versions(then: dict[str, Any]) -> list[str]:
    """Lists what differs now from `then`, an earlier `versions()`."""
    return [
        f"{key} {then.get(key)} -> {now}" for key, now in versions().items() if then.get(key) != now
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # such as dsjax itself, run from a checkout that is not installed


@functools.cache  # the running code was read at the start, so later commits do not matter
def git_commit(folder: Path) -> str | None:
    """Returns the checked-out commit, with "-dirty" if files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
