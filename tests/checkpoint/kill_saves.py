"""Kills a run while it saves, as a power cut might, and takes it up again.

`kill` starts this file as a program: one process pays for the imports and forks a child for each
run, which pytest's, with jax's threads, must not do. A run counts steps and saves after each, the
newest two being kept, so that saves and removals overlap. It is killed before one of its acts on
the disk, or after some time; then the same run goes on, as the same command would. What comes back
says how both ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.checkpoint.kill_points import ROOT, Counter

ACTS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
STEPS = 4


def kill(folder: Path, mode: str, points: list[str]) -> list[dict[str, Any]]:
    """Runs once undisturbed and once for each point, in folders below `folder`.

    Args:
      mode: "sync", where each save is waited for, or "async".
      points: "ACT N", which is before the Nth call of that one of ACTS, or "after SHARE" of the
        time that the undisturbed run takes.

    Returns:
      for the undisturbed run {"acts": calls of each, "final": SHA-256 of the state}, then for each
      point {"killed", "acknowledged": the last step whose save was waited for, "resumed": from
      which step, "final", "left": names in the folder at the end}.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.kill_saves"]
    done = subprocess.run(
        [*command, str(folder), mode, *points], check=True, cwd=ROOT, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


def run(folder: Path, mode: str, report: dict[str, Any]) -> None:
    """A run that goes on from its newest checkpoint to its end."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsjax.checkpoint import store

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 64)).astype(np.float32)
    state = {"weight": jnp.asarray(values), "count": jnp.int32(0)}
    report["resumed"] = step = store.newest_whole(folder, set_aside=True, say=print) or 0
    if step:
        like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)  # noqa: E731
        state = store.restore(folder, step, jax.tree.map(like, state))
    checkpoints = store.Store(folder, keep=2)
    for number in range(step, STEPS):
        noise = np.random.default_rng(number).normal(size=(64, 64)).astype(np.float32)
        weight = np.asarray(state["weight"]) * np.float32(0.9) + noise
        state = {"weight": jnp.asarray(weight), "count": state["count"] + 1}
        checkpoints.save(number + 1, state, {"step": number + 1})
        if mode == "sync":
            checkpoints.wait()
        acknowledge(folder, number + 1 if mode == "sync" else number)
    checkpoints.close()
    digest = hashlib.sha256(b"".join(np.asarray(state[name]).tobytes() for name in sorted(state)))
    report["final"] = digest.hexdigest()
    report["left"] = sorted(path.name for path in folder.iterdir() if path.name != "acknowledged")


def acknowledge(folder: Path, step: int) -> None:
    with (folder / "acknowledged").open("a") as file:
        file.write(f"{step}\n")


def main(root: str, mode: str, *points: str) -> None:
    acts = {name: Counter() for name in ACTS}
    for name, counter in acts.items():
        setattr(os, name, counter.counted(getattr(os, name)))
    import orbax.checkpoint  # noqa: F401

    import dsjax.checkpoint.store  # noqa: F401

    def in_child(folder: Path, seconds: float | None = None) -> dict[str, Any]:
        """Runs in a child, and says how that went; after some seconds the child is killed."""
        read, write = os.pipe()
        if not (child := os.fork()):
            sys.stdout = sys.stderr
            report: dict[str, Any] = {}
            run(folder, mode, report)
            counts = {name: counter.count for name, counter in acts.items()}
            os.write(write, json.dumps(report | {"acts": counts}).encode())
            os._exit(0)
        os.close(write)
        if seconds is not None:
            timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
            timer.start()
        status = os.waitpid(child, 0)[1]
        if seconds is not None:
            timer.cancel()
        with os.fdopen(read) as pipe:
            text = pipe.read()
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
        return json.loads(text) if text else {"killed": True}

    undisturbed = Path(root) / "undisturbed"
    undisturbed.mkdir(parents=True)
    begun = time.monotonic()
    results = [in_child(undisturbed)]
    seconds = time.monotonic() - begun
    for number, point in enumerate(points):
        folder = Path(root) / str(number)
        folder.mkdir()
        kind, value = point.split()
        if kind in acts:
            acts[kind].limit = acts[kind].count + int(value)
            first = in_child(folder)
            acts[kind].limit = 0
        else:
            first = in_child(folder, seconds * float(value))
        log = folder / "acknowledged"
        lines = log.read_text().split() if log.exists() else []
        second = in_child(folder)
        del second["acts"]
        known = {"point": point, "killed": first.get("killed", False)}
        results.append(second | known | {"acknowledged": int(lines[-1]) if lines else 0})
    json.dump(results, sys.stdout)


def moments(count: int, seed: int) -> list[str]:
    """Random moments of a run."""
    draw = random.Random(seed)
    return [f"after {draw.uniform(0.1, 1.0):.4f}" for _ in range(count)]


if __name__ == "__main__":
    main(*sys.argv[1:])
