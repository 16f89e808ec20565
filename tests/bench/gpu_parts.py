"""The parts of `tests.bench.bench_gpu`, each to be run in a process of its own. A figure is a JSON
object on a line of its own, printed as soon as it is known.

Run: python -m tests.bench.gpu_parts NAME [--dry-run], where NAME is machine,
decoding_kernels, train CASE, decode, decode plain, fp8, products, attention, documents, tests or
command
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from configs.small import config as SMALL
from dsjax.config import Config, ModelConfig, PrecisionConfig
from dsjax.kernels import attention as whole_sequences
from dsjax.kernels import hopper_attention, hopper_grouped, hopper_scaled
from dsjax.kernels.cudnn_attention import cudnn_attention
from dsjax.kernels.flash_attention import chunked_attention
from dsjax.kernels.fp8_gemm import scaled_grouped_matmul
from dsjax.kernels.grouped_matmul import grouped_matmul
from dsjax.kernels.target import Target, tokamax
from dsjax.model.flops import train_flops_per_token
from dsjax.plan import kernels
from dsjax.precision.fp8 import CHANNEL_TILE, WEIGHT_BLOCK, quantize_block
from dsjax.train.throughput import measure_matmul_flops
from tests.bench import bench_fp8_gemm
from tests.bench.bench_decode import (
    NEW,
    PROMPT,
    bytes_read,
    dsjax_generate,
    measure_read_rate,
    step_seconds,
)
from tests.bench.bench_gpu import NO_GPU
from tests.bench.bench_kernels import portions
from tests.bench.sides import (
    MODEL_3B,
    V3_ROUTING,
    Step,
    case,
    dsjax_step,
    median_seconds,
    seconds,
)

ROOT = Path(__file__).parents[2]
ROUNDS, LEARNED = 10, 30  # timed steps; steps on one batch after which losses are compared
BATCHES = 1, 8, 32
DOCUMENT = 256  # tokens
# Of what a decoding step starts.
KERNELS = ("few_rows", "latent_queries", "latent_attention", "expert_choice", "mixture_step",
           "grouped_mixture", "likeliest_token")  # fmt: skip
# Of no size, for a dry run.
MODEL_TINY = ModelConfig(
    vocab_size=256,
    dim=64,
    n_layers=2,
    n_dense_layers=1,
    n_heads=2,
    inter_dim=128,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=8,
    n_shared_experts=1,
    n_activated_experts=2,
    moe_inter_dim=64,
    n_expert_groups=2,
    n_limited_groups=1,
    **V3_ROUTING,
)


def say(**figure: Any) -> None:
    print(json.dumps(figure), flush=True)


def config_of(name: str, dry_run: bool) -> Config:
    """The shapes of `docs/records/h200_202611.md`; an H100 of 80 GB takes half of the 3B batch."""
    if dry_run:
        return case(name, MODEL_TINY, 2, 64, "float32", "none")
    if name == "small":
        model = dataclasses.replace(SMALL.model, n_mtp=0)
        return case(name, model, 16, 2048, "bfloat16", "none")
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return case(name, MODEL_3B, 4 if memory > 110e9 else 1, 4096, "bfloat16", "none")


def with_fp8(config: Config) -> Config:
    precision = PrecisionConfig(compute=config.precision.compute, fp8="on")
    return dataclasses.replace(config, precision=precision)


def peak_gigabytes() -> float:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9


def product_rate(config: Config, dry_run: bool) -> float:
    return measure_matmul_flops(256 if dry_run else 8192, jnp.dtype(config.precision.compute))


def machine(dry_run: bool) -> None:
    from importlib.metadata import version

    if not dry_run and jax.default_backend() != "gpu":
        sys.exit(NO_GPU)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"],
        capture_output=True, text=True,
    ) if jax.default_backend() == "gpu" else None  # fmt: skip
    shown = f", driver {driver.stdout.strip()}" if driver and driver.returncode == 0 else ""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax"))
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"{jax.devices()[0].device_kind}{shown}, {os.cpu_count()} CPU cores, ", end="")
    print(f"Python {python}, {libraries}")


def train(dry_run: bool, name: str) -> None:
    """A training step: seconds, tokens/s and the share of the machine's product rate."""
    config = config_of(name, dry_run)
    say(**{"product rate, TFLOP/s": product_rate(config, dry_run) / 1e12})
    _timed(name, config, dsjax_step(config), dry_run)


def _timed(what: str, config: Config, step: Step, dry_run: bool) -> None:
    first = seconds(step)
    rounds = 2 if dry_run else ROUNDS
    taken = median_seconds({"": step}, rounds)[""]
    tokens = config.train.batch_size * config.data.sequence_length
    flops = train_flops_per_token(config.model, config.data.sequence_length) * tokens
    say(**{
        "what": what,
        "batch": f"{config.train.batch_size} x {config.data.sequence_length}",
        "first step, s": first,
        "step, s": taken,
        "tokens/s": tokens / taken,
        "share of the product rate, %": 100 * flops / taken / product_rate(config, dry_run),
        "memory, GB": peak_gigabytes(),
    })  # fmt: skip


def fp8(dry_run: bool) -> None:
    """Training steps with and without FP8 products, and what both have learned of one batch."""
    for what, config in (
        ("bfloat16", config_of("small", dry_run)),
        ("FP8", with_fp8(config_of("small", dry_run))),
    ):
        run, losses = dsjax_step(config), list[float]()

        def step(run: Step = run, losses: list[float] = losses) -> float:
            losses.append(run())
            return losses[-1]

        _timed(what, config, step, dry_run)
        while len(losses) < (4 if dry_run else LEARNED):
            step()
        say(**{"products": what, "steps": len(losses), "first loss": losses[0],
               "last loss": losses[-1]})  # fmt: skip


@contextlib.contextmanager
def watched() -> Iterator[list[Any]]:
    """Collects the programs that are compiled meanwhile."""
    compiled: list[Any] = []
    original: Callable[..., Any] = jax.stages.Lowered.compile

    def compile_(lowered: Any, *arguments: Any, **options: Any) -> Any:
        compiled.append(original(lowered, *arguments, **options))
        return compiled[-1]

    with mock.patch.object(jax.stages.Lowered, "compile", compile_):
        yield compiled


def decoding_kernels(dry_run: bool) -> None:
    """The tests of each Triton kernel, on the GPU as they are: which fail, and how. Each in a
    process of its own, for one that reads what it may not read ends all after it.
    """
    environment = {"JAX_PLATFORMS": "cpu" if dry_run else "cuda,cpu"}
    # They run side by side, so none may take all memory.
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    names, said = ("expert_choice",) if dry_run else KERNELS, ""
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(_pytest, [f"tests/kernels/test_{name}.py"], environment)
                for name in names]  # fmt: skip
        for name, run in zip(names, runs, strict=True):
            done = run.result()
            lines = done.stdout.strip().splitlines() or [""]
            failed = [line.replace("|", "/") for line in lines if line.startswith("FAILED")]
            ended = done.returncode in (0, 1)  # all tests ran
            say(**{"kernels": name, "result": lines[-1] if ended else f"ended: {done.returncode}",
                   "failed": "; ".join(failed)})  # fmt: skip
            if done.returncode:
                said += done.stdout[-2000:] + done.stderr[-1000:]
    if said:
        sys.exit(said)


def _pytest(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def decode(dry_run: bool, kind: str = "") -> None:
    """A step of decoding: milliseconds and the share of the bandwidth limit, then its kernels.

    Args:
      kind: "plain" for what XLA makes without our kernels, as on any GPU.
    """
    if kind == "plain":
        with mock.patch.object(Target, "is_hopper", False):
            decode(dry_run)
        return
    config = config_of("3B", dry_run)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=1))
    generate, rate = dsjax_generate(config), measure_read_rate()
    say(**{"copies at, GB/s": rate / 1e9})
    programs = {}
    for batch in BATCHES:
        vocabulary = config.model.vocab_size
        prompts_BT = np.random.default_rng(0).integers(0, vocabulary, (batch, PROMPT))
        with watched() as programs[batch]:
            # One comes of the prompt, the others of steps that need no host, 16 at a time.
            taken = step_seconds({"": generate}, prompts_BT, NEW + 1)[""]
        limit = bytes_read(config, batch, PROMPT + NEW / 2) / rate
        say(**{
            "batch": batch,
            "ms per step": taken * 1e3,
            "tokens/s": batch / taken,
            "limit, ms": limit * 1e3,
            "share of the limit, %": 100 * limit / taken,
        })  # fmt: skip
    for batch, compiled in programs.items():
        loops = (steps_of(str(each.as_text()), config.model, batch) for each in compiled)
        for loop in filter(None, loops):
            say(**{
                "batch": batch,
                "steps of a call": loop.trips or "as many as there are",
                "kernels of a step": loop.body.starts,
                "waits for the host": loop.body.waits + (loop.trips is None),
                "GB moved": loop.body.bytes / 1e9,
            })  # fmt: skip


def steps_of(text: str, model: ModelConfig, batch: int) -> kernels.Loop | None:
    """Returns the loop over steps of a program that decodes; None for others."""
    if "jit_decode" not in text.partition("\n")[0] or jax.default_backend() != "gpu":
        return None
    loops = kernels.read(text, portions(model, batch)).loops
    return loops[0] if loops else None


def products(dry_run: bool) -> None:
    """Dense FP8 products, and products of groups in both types, at DeepGEMM's shapes; and what
    quantising costs.
    """
    limit = bench_fp8_gemm.limits(256 if dry_run else 8192)
    for kind, rate in limit.items():
        say(**{"square product": kind, "TFLOP/s": rate / 1e12})
    # Groups, rows of each, K, N: training, then the few rows of decoding.
    shapes = ((4, 8192, 7168, 4096), (4, 8192, 2048, 7168), (8, 4096, 7168, 4096))
    for groups, rows, k, n in ((2, 256, 128, 256),) if dry_run else shapes:
        for kind, product in _grouped(groups, rows, k, n).items():
            flops = 2.0 * groups * rows * k * n
            rate = bench_fp8_gemm.rates({kind: product}, flops)[kind]
            say(**{"groups": groups, "rows": rows, "K": k, "N": n, "product": kind,
                   "TFLOP/s": rate / 1e12})  # fmt: skip
    for rows, width in ((256, 128),) if dry_run else ((131072, 768), (32768, 7168)):
        needed = rows * width * (2 + 2 * (1 + 4 / 128))  # bfloat16 read; E4M3 and scales written
        for kind, rate in bench_fp8_gemm.rates(
            bench_fp8_gemm.quantising(rows, width), needed
        ).items():
            say(**{"rows": rows, "width": width, "quantised by": kind,
                   "TB/s of what is needed": rate / 1e12})  # fmt: skip
    dense = ((64, 128, 256),) if dry_run else ((4096, 7168, 4096), (4096, 2048, 7168),
                                               (128, 7168, 4096), (4096, 16384, 7168))  # fmt: skip
    for m, k, n in dense:
        rates = bench_fp8_gemm.rates(bench_fp8_gemm.products(m, k, n), 2.0 * m * k * n)
        say(**{"M": m, "K": k, "N": n, **{f"{kind}, TFLOP/s": rate / 1e12
                                          for kind, rate in rates.items()}})  # fmt: skip


def _grouped(groups: int, rows: int, k: int, n: int) -> dict[str, bench_fp8_gemm.Product]:
    """Products of equal groups; uneven ones are in the tests."""
    target = Target.here()
    x_AK = jax.random.normal(jax.random.key(0), (groups * rows, k), jnp.bfloat16)
    w_EKN = jax.random.normal(jax.random.key(1), (groups, k, n), jnp.bfloat16)
    sizes_E = jnp.full(groups, rows, jnp.int32)
    x, w = quantize_block(x_AK, CHANNEL_TILE), quantize_block(w_EKN, WEIGHT_BLOCK)

    def by_slices(x, x_scales, w, w_scales, sizes_E):
        return scaled_grouped_matmul(x, x_scales, w, w_scales, sizes_E).astype(jnp.bfloat16)

    bf16 = functools.partial(grouped_matmul, target=target, dtype=jnp.bfloat16)
    scaled, columns = by_slices, (w.values, w.scales)
    if target.is_hopper:
        assert hopper_grouped.fits(x_AK, w_EKN)
        scaled = functools.partial(hopper_scaled.grouped_matmul, dtype=jnp.bfloat16)
        columns = w.values.mT, jnp.repeat(w.scales, WEIGHT_BLOCK[1], axis=2)[:, :, :n].mT
    return {
        "bf16": bench_fp8_gemm.bind(bf16, (x_AK, w_EKN, sizes_E)),
        "scaled e4m3": bench_fp8_gemm.bind(scaled, (x.values, x.scales, *columns, sizes_E)),
    }


def attention(dry_run: bool) -> None:
    """Attention at the shapes of both training steps: within documents by each kernel that there
    is, and where each row is a document.
    """
    shapes = (16, 2048, 12, 96, 64), (4, 4096, 16, 192, 128)
    for B, T, N, H, W in ((1, 128, 2, 32, 16),) if dry_run else shapes:
        keys = jax.random.split(jax.random.key(0), 4)
        *operands, dout = (
            jax.random.normal(key, (B, T, N, width), jnp.bfloat16)
            for key, width in zip(keys, (H, H, W, W), strict=True)
        )
        for kind, attend in _attentions(B, T, H).items():

            def step(dout, *operands, attend=attend):
                return jax.vjp(attend, *operands)[1](dout)

            say(**{"batch x length x heads": f"{B} x {T} x {N}", "widths": f"{H} and {W}",
                   "attention": kind, "forward, ms": _milliseconds(attend, operands),
                   "forward and backward, ms": _milliseconds(step, [dout, *operands])})  # fmt: skip


def _milliseconds(function: Callable[..., Any], operands: Sequence[jax.Array]) -> float:
    compiled = jax.jit(function).lower(*operands).compile()

    def run() -> jax.Array:
        return jax.tree.leaves(compiled(*operands))[0]

    return 1e3 / bench_fp8_gemm.rates({"": run}, 1.0)[""]


def _attentions(rows: int, length: int, width: int) -> dict[str, Callable[..., jax.Array]]:
    """Functions of queries, keys and values; on a CPU the Triton kernels are interpreted."""
    is_hopper = Target.here().is_hopper
    one_BT = jnp.ones((rows, length), jnp.int32)
    ids_BT = one_BT + jnp.arange(length, dtype=jnp.int32)[None] // DOCUMENT
    scale = width**-0.5
    within, in_rows = (
        functools.partial(
            hopper_attention.document_attention,
            segment_ids_BT=segments_BT, scale=scale, interpret=not is_hopper,
        )
        for segments_BT in (ids_BT, one_BT)
    )  # fmt: skip
    plain = functools.partial(chunked_attention, scale=scale, segment_ids_BT=ids_BT)
    found = {
        f"Triton, documents of {DOCUMENT}": within,
        f"XLA, documents of {DOCUMENT}": plain,
        "Triton, rows are documents": in_rows,
    }
    if is_hopper:
        found["cuDNN, rows are documents"] = functools.partial(cudnn_attention, scale=scale)
    if is_hopper and tokamax():
        found[f"tokamax, documents of {DOCUMENT}"] = functools.partial(
            whole_sequences.tokamax_attention, scale=scale, segment_ids_BT=ids_BT
        )
    return found


def documents(dry_run: bool) -> None:
    """A step whose attention stays within documents, beside one whose rows are documents."""
    whole = config_of("small", dry_run)
    isolated = dataclasses.replace(
        whole, data=dataclasses.replace(whole.data, isolate_documents=True)
    )
    rows, length = whole.train.batch_size, whole.data.sequence_length
    size = 16 if dry_run else DOCUMENT
    segments_BT = np.broadcast_to(
        1 + np.arange(length + 1, dtype=np.int32) // size, (rows, length + 1)
    )
    _timed("rows are documents", whole, dsjax_step(whole), dry_run)
    step = dsjax_step(isolated, segments_BT)
    _timed(f"isolated documents of {size}", isolated, step, dry_run)


def tests(dry_run: bool) -> None:
    """Tests that need a GPU; of a dry run, one that needs none."""
    on_gpu = (
        ["-m", "gpu or not gpu", "tests/kernels/test_cudnn_attention.py",
         "tests/kernels/test_hopper_grouped.py", "tests/kernels/test_hopper_scaled.py",
         "tests/precision/test_hopper_quantize.py"],
        ["tests/kernels/test_hopper_attention.py"],
        ["-m", "gpu", "tests/precision/test_matmul.py"],
    )  # fmt: skip
    environment = {"JAX_PLATFORMS": "cpu" if dry_run else "cuda,cpu"}
    said = ""
    for arguments in (["tests/kernels/test_target.py"],) if dry_run else on_gpu:
        done = _pytest(arguments, environment)
        say(tests=" ".join(arguments), result=(done.stdout.strip().splitlines() or [""])[-1])
        if done.returncode:
            said += done.stdout[-2000:] + done.stderr[-2000:]
    if said:
        sys.exit(said)


def command(dry_run: bool) -> None:
    """tools/train.py with evaluation, checkpoints and a sample."""
    steps = 3 if dry_run else 60
    settings = [f"train.steps={steps}", "train.eval_sequences=8", f"train.checkpoint_every={steps}"]
    settings += ["train.batch_size=2", "train.micro_batch_size=2"] if dry_run else []
    settings += [] if dry_run else ["precision.compute=bfloat16"]
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "tools/train.py", "configs/tiny.py", "--workdir", folder, "--set"]
        start = time.perf_counter()
        done = subprocess.run([*run, *settings], cwd=ROOT, capture_output=True, text=True)
        taken = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        summary = json.loads((Path(folder) / "summary.json").read_text())
    say(**{"settings": " ".join(settings), "seconds": taken})
    say(**{name: value for name, value in summary.items() if isinstance(value, int | float | str)})


PARTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        machine, decoding_kernels, train, decode, fp8, products, attention, documents, tests,
        command,
    )
}  # fmt: skip


def main() -> None:
    name, *arguments = [text for text in sys.argv[1:] if text != "--dry-run"]
    PARTS[name]("--dry-run" in sys.argv, *arguments)


if __name__ == "__main__":
    main()
