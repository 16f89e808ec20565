"""A soak: trains with kills, stops, resumes, evaluation and generation, for as long as one likes.

  python -m tests.soak --minutes 30

Two things are watched. A run whose trainer is killed (SIGKILL, SIGTERM, Ctrl-C) at random moments
and resumed, again and again, must end with the same bits as one that nobody disturbed: parameters,
moments, router bias, place in the data, metrics; no checkpoint may be damaged, no process left.
And a process that trains, saves, restores, evaluates and generates round after round must not grow:
the memory in use (Linux with glibc) and open files are printed, and the soak fails when the last
half of the rounds holds more than the first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GROWTH = 1.05  # how much more memory the later rounds may hold than the earlier ones
CONFIG = """
from dsjax.config import Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig

config = Config(
    name="soak",
    model=ModelConfig(
        vocab_size=300, dim=16, n_layers=2, n_dense_layers=1, n_heads=2, inter_dim=32,
        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4,
        n_shared_experts=1, n_activated_experts=2, moe_inter_dim=8, router_bias=True,
        norm_topk=True, n_mtp=1, max_seq_len=32, init_std=0.05,
    ),
    data=DataConfig(
        files="{root}/text/*.txt", heldout_fraction=0.2, sequence_length=32,
        cache_dir="{root}/cache",
    ),
    train=TrainConfig(
        steps={steps}, batch_size=8, log_every=5, eval_every=20, eval_sequences=8,
        checkpoint_every=7, sample_tokens=8, tensorboard=False,
    ),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=2, moment_dtype="bfloat16"),
    precision=PrecisionConfig(compute="float32"),
)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        write_text(root / "text")
        kills = disturb(
            root, random.Random(arguments.seed), time.monotonic() + 30 * arguments.minutes
        )
        rounds = repeat(root, deadline)
    finally:
        shutil.rmtree(root)
    print(f"passed: {kills} interruptions survived to the bit, {rounds} rounds without growth")
    return 0


def write_text(folder: Path) -> None:
    folder.mkdir()
    draw = random.Random(0)
    words = ["attention", "latent", "expert", "router", "token", "balance", "of", "the", "a", "is"]
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=120)))


def disturb(root: Path, draw: random.Random, deadline: float) -> int:
    """Kills and resumes trainers until the time is over; returns how often."""
    config = root / "config.py"
    config.write_text(CONFIG.format(root=root, steps=40))
    for name in ("first", "calm"):  # the first one compiles
        begun = time.monotonic()
        start(config, root / name).wait()
        seconds = time.monotonic() - begun
    wanted = state(root / "calm")
    check(state(root / "first") == wanted, "two undisturbed runs differ")
    print(f"undisturbed: {seconds:.0f} s, {wanted}", flush=True)
    kills = number = 0
    while time.monotonic() < deadline or not kills:
        folder = root / f"disturbed{number}"
        killed = 0
        while not (folder / "summary.json").exists():
            process = start(config, folder)
            how = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            # After some resumes the run is left in peace, so that it ends.
            try:
                process.wait(draw.uniform(0.1, 1.0) * seconds if killed < 6 else None)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, how)
                code = process.wait()
                killed += 1
                # -how: before it listened, or what nobody can listen to. A shell shows 128 + how.
                allowed = {0, -how} if how == signal.SIGKILL else {0, -how, 128 + how}
                check(code in allowed, f"{how.name} gave exit code {code}")
            check(not descendants(process.pid), "a trainer left processes behind")
        check(state(folder) == wanted, f"{folder} ended with other bits after {killed} kills")
        kills, number = kills + killed, number + 1
        print(f"run {number}: killed {killed} times, the same bits", flush=True)
        shutil.rmtree(folder)
    return kills


def start(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(config)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # A session of its own: what it leaves behind can be found by its number.
    return subprocess.Popen(
        [*command, "--workdir", str(folder)], env=environment, start_new_session=True, **quiet
    )


def descendants(session: int) -> list[int]:
    """Processes that still live in a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def state(folder: Path) -> str:
    """A digest of what a finished run left: its arrays, its place in the data, its metrics."""
    from dsjax.checkpoint import audit, manifest
    from dsjax.train.throughput import TIMED

    listing = audit.survey(folder)
    check(listing["fine"], f"{folder} has damaged checkpoints: {listing}")
    newest = manifest.read(audit.locate(folder))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: line[key] for key in line if key not in TIMED} for line in metrics]
    kept = [newest.leaves, newest.record["data"], newest.record["step"], lines]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def repeat(root: Path, deadline: float) -> int:
    """Trains, saves, restores, evaluates and generates in this process, round after round."""
    import io

    from rich.console import Console

    import dsjax
    from dsjax import settings
    from dsjax.generate.engine import Engine, Request
    from dsjax.generate.sampling import Sampling
    from dsjax.train import pretraining

    console = Console(file=io.StringIO(), width=120)
    held: list[tuple[float, int]] = []
    while time.monotonic() < deadline or len(held) < 8:
        for steps in (7, 14):  # the second one resumes, on the same compiled programs
            (root / "round.py").write_text(CONFIG.format(root=root, steps=14))
            config = settings.override(
                settings.load_config(root / "round.py"), [f"train.steps={steps}"]
            )
            pretraining.train(config, root / "round", command="", console=console)
        engine = Engine(dsjax.load(root / "round"))
        for _ in engine.generate([Request((1, 2, 3), 8, Sampling(temperature=0.0))]):
            pass
        shutil.rmtree(root / "round")
        del engine
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of freed memory is no growth of ours
        held.append((resident_megabytes(), len(os.listdir("/proc/self/fd"))))
        print(f"round {len(held)}: {held[-1][0]:.0f} MB, {held[-1][1]} open files", flush=True)
    later = held[len(held) // 4 :]  # the first rounds compile, and fill caches
    early, late = later[: len(later) // 2], later[len(later) // 2 :]
    check(
        min(mb for mb, _ in late) <= GROWTH * max(mb for mb, _ in early),
        f"memory grows: {[round(mb) for mb, _ in held]} MB",
    )
    check(late[-1][1] <= early[0][1], f"open files grow: {[n for _, n in held]}")
    return len(held)


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def check(fine: bool, what: str) -> None:
    if not fine:
        raise SystemExit(f"soak failed: {what}")


if __name__ == "__main__":
    sys.exit(main())
