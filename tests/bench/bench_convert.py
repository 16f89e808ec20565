"""Import of a V3-shaped FP8 checkpoint: peak memory, and speed as a share of copying its files.

The checkpoint has V3's widths and as many MoE layers with 256 experts as the size asks for, about
11.3 GB each, in FP8 with a float32 scale a 128 x 128 block, spread over the files. Its numbers are
random bytes that are E4M3 numbers, the same few megabytes over and over: neither side's speed
depends on them.

Copy and imports take turns, each file or chunk forced to the disk on both sides, each from a cold
page cache where the system lets this process drop it, else from one as warm as the memory allows;
the median of the rounds is taken. The import runs in a process of its own, whose peak resident
memory the kernel reports.

Run: python -m tests.bench.bench_convert [--gigabytes 10] [--files 16] [--rounds 3] [--folder DIR]
DIR needs room for the checkpoint and two copies of it, in bfloat16 one more; it is emptied.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from dsjax.checkpoint import names
from dsjax.checkpoint.hf_config import to_hf
from dsjax.checkpoint.hf_folder import FLOAT32, FP8, scale_name, scale_shape
from dsjax.checkpoint.tensor_files import plan_shards, write_index, write_shard
from dsjax.config import ModelConfig
from dsjax.display import size
from dsjax.files import write_json
from dsjax.settings import load_config

ROOT = Path(__file__).parents[2]
BLOCK = (128, 128)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
GIGABYTE = 10**9


def shape_of(gigabytes: float) -> ModelConfig:
    """V3 with one dense layer, no MTP, and the MoE layers that make up at least this size."""
    published = load_config(ROOT / "configs" / "v3_671b.py").model
    for n_layers in range(2, published.n_layers):
        model = dataclasses.replace(published, n_layers=n_layers, n_dense_layers=1, n_mtp=0)
        if sum(n_bytes(dtype, shape) for _, dtype, shape in tensors(model)) >= gigabytes * GIGABYTE:
            return model
    raise SystemExit(f"V3 is smaller than {gigabytes} GB")


def tensors(model: ModelConfig) -> Iterator[tuple[str, np.dtype, tuple[int, ...]]]:
    for row in names.tensors(model, "deepseek_v3"):
        if row.quantized:
            yield row.name, FP8, row.shape
            yield scale_name(row.name), FLOAT32, scale_shape(row.shape, BLOCK)
        else:
            yield row.name, FLOAT32 if row.keep_float32 else BFLOAT16, row.shape


def n_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def make(folder: Path, model: ModelConfig, files: int) -> tuple[int, int]:
    """Writes the checkpoint; returns the bytes of its tensors and of the largest of them."""
    planned = list(tensors(model))
    sizes = [n_bytes(dtype, shape) for _, dtype, shape in planned]
    limit = sum(sizes)
    while len(shards := plan_shards(planned, limit)) < files:
        limit -= limit // 100
    bits = np.random.default_rng(0).integers(0, 0x7F, 32 << 20, np.uint8)  # 0x7F is NaN
    values = {FP8: bits.view(FP8), BFLOAT16: (bits.view(np.uint16) & 0x3FFF).view(BFLOAT16)}
    values[FLOAT32] = np.random.default_rng(1).uniform(1e-4, 1e-3, 1 << 20).astype(np.float32)
    layout = {name: (dtype, shape) for name, dtype, shape in planned}

    def produce(name: str) -> np.ndarray:
        dtype, shape = layout[name]
        return np.resize(values[dtype], shape)

    folder.mkdir()
    for shard in shards:
        write_shard(folder, shard, produce)
    write_index(folder, shards)
    write_json(folder / "config.json", to_hf(model, "deepseek_v3", block=BLOCK))
    return sum(sizes), max(sizes)


def forget_pages() -> bool:
    """Drops the page cache, if this process may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def copy(source: Path, target: Path) -> float:
    """Seconds that a plain copy takes, file by file, each forced to the disk."""
    started = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as copied:
            os.fsync(copied.fileno())
    return time.perf_counter() - started


# Prints the seconds of the import alone and the peak of the whole process.
_IMPORT = """
import json, pathlib, sys, time
from rich.console import Console
from dsjax.checkpoint.importing import import_checkpoint
from dsjax.display import Transfer
source, target, dtype = sys.argv[1:]
with Transfer(Console(stderr=True)) as progress:
    started = time.perf_counter()
    import_checkpoint(pathlib.Path(source), pathlib.Path(target), dtype=dtype, progress=progress)
    seconds = time.perf_counter() - started
status = pathlib.Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def convert(source: Path, target: Path, dtype: str) -> dict[str, float]:
    """Imports in a process of its own; returns seconds and peak resident bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, str(source), str(target), dtype],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def measure(folder: Path, gigabytes: float, files: int, rounds: int) -> None:
    source, target = folder / "source", folder / "target"
    total, largest = make(source, shape_of(gigabytes), files)
    cold = forget_pages()
    print(f"{platform.machine()}, {os.cpu_count()} cores; page cache {'cold' if cold else 'warm'}")
    n_files = len(list(source.glob("*.safetensors")))
    print(f"checkpoint: {size(total)} in {n_files} files, largest tensor {size(largest)}")
    ways = ["copy", "keep", "bfloat16"]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for _ in range(rounds):
        for way in list(ways):
            written = total * (2 if way == "bfloat16" else 1)
            if shutil.disk_usage(folder).free < 1.05 * written:
                print(f"{way}: no room for {size(written)}, left out")
                ways.remove(way)
                continue
            forget_pages()
            if way == "copy":
                seconds[way].append(copy(source, target))
            else:
                done = convert(source, target, way)
                seconds[way].append(done["seconds"])
                peaks[way] = max(peaks.get(way, 0), done["peak"])
            shutil.rmtree(target)
    base = statistics.median(seconds["copy"])
    for way in ways:
        median = statistics.median(seconds[way])
        line = f"{way:9} {median:7.1f} s  {size(total / median)}/s read"
        line += f"  {base / median:4.0%} of the copy's speed"
        if way in peaks:
            line += f"  peak {size(peaks[way])}, {size(peaks[way] - largest)} above the tensor"
        print(f"{line}  ({', '.join(f'{each:.1f}' for each in seconds[way])})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room (default: a new one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsjax-bench-", dir=arguments.folder) as folder:
        measure(Path(folder), arguments.gigabytes, arguments.files, arguments.rounds)


if __name__ == "__main__":
    main()
