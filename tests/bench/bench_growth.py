"""How costs grow with the work: with experts, layers, the length of a sequence, the rows and the
cache of decoding, and with documents, each beside what the operations and the bytes alone let
expect.

Models are the 80M parameters of bench_train_step with one size changed: a training step with more
experts of which as many are activated, with more layers, on one longer sequence; the same sequence
as a prompt; a decoding step of more rows, or after a longer text. Documents are laid out for an
epoch, read as 1,000 rows, and searched for near copies. Times are of the processor, on one core, as
other work disturbs them less than the clock's, and with freed memory kept, as our commands that
train do.

What is expected of a model is the time of its operations at this core's rate of large products and
of its bytes at the rate at which it adds up a large array: in training, an array of parameters is
read by both passes, its gradient written and read twice, and it and its moments read and written
once. An exponent is the slope of log time over log size, least squares over all sizes, and of the
last two sizes.

Each size runs in a process of its own and is written to FILE when it is measured, so a stopped run
goes on where it was.

Run: python -m tests.bench.bench_growth FILE [names of axes]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsjax.config import Config
from dsjax.train.host_memory import keep_freed

NEW = 128  # tokens of a decoding run
ROWS = 1000
BYTES_PER_PARAMETER = 44  # of a training step, float32
COPIES = 0.1  # the share of documents that are near copies of an earlier one


class Cost(NamedTuple):
    """What was measured, in seconds of the processor, and what it consists of."""

    seconds: float
    flops: float = 0.0
    bytes: float = 0.0
    items: float = 0.0  # where neither is counted


class Axis(NamedTuple):
    """Something that grows."""

    title: str
    sizes: tuple[int, ...]
    measure: Callable[[int], Cost]


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    """Of the processor, without the first call, which compiles."""
    run()
    return statistics.median(processor_seconds(run) for _ in range(rounds))


def processor_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def of_shape(batch: int, length: int, **changes: int) -> Config:
    from tests.bench.sides import MODEL_80M, case

    model = dataclasses.replace(MODEL_80M, max_seq_len=16384, **changes)
    return case("80M", model, batch, length, "float32")


def training(config: Config) -> Cost:
    from dsjax.model.flops import count_parameters, train_flops_per_token
    from dsjax.model.parameters import declarations
    from dsjax.train.step import declared_model
    from tests.bench.sides import dsjax_step

    declared = declared_model(config.model, config.precision)
    parameters = count_parameters(declarations(declared), config.model).total
    length = config.data.sequence_length
    flops = train_flops_per_token(config.model, length) * config.train.batch_size * length
    rounds = 3 if flops < 1e12 else 2
    seconds = median_seconds(dsjax_step(config), rounds)
    return Cost(seconds, flops, BYTES_PER_PARAMETER * parameters)


def prefill(length: int) -> Cost:
    from dsjax.model.flops import forward_flops_per_token
    from tests.bench.bench_decode import dsjax_generate

    config = of_shape(1, length)
    generate = dsjax_generate(config)
    prompt_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, length))
    seconds = median_seconds(lambda: generate(prompt_BT, 1), 3 if length < 4096 else 2)
    return Cost(seconds, length * forward_flops_per_token(config.model, length))


def decoding(batch: int, cached: int) -> Cost:
    """A step of `batch` rows, of which the cache has room for `cached` tokens each."""
    from dsjax.model.flops import forward_flops_per_token
    from tests.bench.bench_decode import bytes_read, dsjax_generate

    config, prompt = of_shape(batch, cached), cached - NEW
    # Prompts are known after the first run, so what is timed does not contain them.
    generate = dsjax_generate(config, prefix_tokens=2 * batch * cached)
    prompts_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, (batch, prompt))

    def step_seconds() -> float:
        one, many = (processor_seconds(lambda n=n: generate(prompts_BT, n)) for n in (1, NEW))
        return (many - one) / (NEW - 1)

    step_seconds()
    seconds = statistics.median(step_seconds() for _ in range(3))
    seen = prompt + NEW // 2
    # `forward_flops_per_token` counts the mean of a sequence's tokens: half its length.
    flops = batch * forward_flops_per_token(config.model, 2 * seen)
    return Cost(seconds, flops, bytes_read(config, batch, seen))


def tokenized(count: int) -> Any:
    """Documents of about 100 tokens."""
    from dsjax.data.corpus import TokenizedDocuments

    lengths = np.random.default_rng(0).integers(50, 150, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1], dtype=np.uint64).astype(np.uint16)
    return TokenizedDocuments(tokens, offsets, lengths * 4, "documents")


def packed(documents: Any) -> Any:
    from dsjax.data.packing import PackedSequences
    from dsjax.text.tokenizer import SpecialTokens

    special = SpecialTokens(bos=0, eos=1, pad=2, fim=(3, 4, 5))
    return PackedSequences(documents, special, sequence_length=256, fim_rate=0.1)


def laying_out(count: int) -> Cost:
    documents = tokenized(count)
    made = min(processor_seconds(lambda: packed(documents)) for _ in range(5))
    read = min(processor_seconds(lambda: packed(documents)[0]) for _ in range(5))
    return Cost(read - made, items=count * math.log2(count))


def reading(count: int) -> Cost:
    rows = packed(tokenized(count))
    rows[0]
    seconds = median_seconds(lambda: [rows[row] for row in range(ROWS)], 3)
    return Cost(seconds, items=1.0)


def near_copies(count: int) -> Cost:
    from dsjax.curate import duplicates
    from dsjax.curate.shingles import VALUES, bands, rows_per_band

    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (count, VALUES), np.uint32)
    copies = np.flatnonzero(rng.random(count) < COPIES)
    copies = copies[copies > 0]
    signatures[copies, 8:] = signatures[rng.integers(0, copies), 8:]

    def similarity(one: int, other: int) -> float:
        return float((signatures[one] == signatures[other]).mean())

    def search() -> object:
        shared = duplicates.buckets(bands(signatures, rows_per_band(0.8)))
        return duplicates.near(shared, signatures, 0.8, similarity)

    seconds = statistics.median(processor_seconds(search) for _ in range(3))
    return Cost(seconds, items=count * math.log2(count))


LENGTHS = (512, 1024, 2048, 4096, 8192)
DOCUMENTS = (10, 100, 1000, 10_000, 100_000, 1_000_000)
AXES = {
    "experts": Axis(
        "Training, 4 x 512 tokens: experts, 4 of them activated",
        (8, 32, 128),
        lambda size: training(of_shape(4, 512, n_routed_experts=size)),
    ),
    "layers": Axis(
        "Training, 4 x 512 tokens: layers",
        (3, 6, 12),
        lambda size: training(of_shape(4, 512, n_layers=size)),
    ),
    "sequence": Axis(
        "Training, one sequence: tokens", LENGTHS, lambda size: training(of_shape(1, size))
    ),
    "prompt": Axis("A prompt: tokens", LENGTHS, prefill),
    "rows": Axis(
        "A decoding step after 192 tokens: rows",
        (1, 4, 16, 32, 64),
        lambda size: decoding(size, 256),
    ),
    "cache": Axis(
        "A decoding step of one row: tokens of the cache",
        (256, 1024, 4096, 8192),
        lambda size: decoding(1, size),
    ),
    "layout": Axis("An epoch laid out: documents", DOCUMENTS, laying_out),
    "reading": Axis("1,000 rows of an epoch: documents", DOCUMENTS, reading),
    "copies": Axis(
        "Near copies found, a tenth being some: documents", DOCUMENTS, near_copies
    ),
}  # fmt: skip


def rates() -> dict[str, float]:
    """This core's: operations of large products, and bytes added up, a second."""
    import jax
    import jax.numpy as jnp

    matrix, array = jnp.ones((4096, 4096)), jnp.ones((2**27,))
    multiply, add_up = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    product = median_seconds(lambda: multiply(matrix, matrix).block_until_ready(), 5)
    total = median_seconds(lambda: add_up(array).block_until_ready(), 5)
    return {"flops": 2 * 4096**3 / product, "bytes": array.nbytes / total}


def measured(name: str, size: int) -> dict[str, float]:
    """Runs in a process of its own."""
    keep_freed()
    return rates() if name == "rates" else AXES[name].measure(size)._asdict()


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Pins this process, and those that it starts, to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def slopes(sizes: list[int], costs: list[float]) -> tuple[float, float]:
    """Returns the exponents over all sizes and over the last two."""
    x, y = np.log(sizes), np.log(costs)
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def table(name: str, costs: dict[int, Cost], rate: dict[str, float]) -> str:
    """The sizes of an axis that are measured, as Markdown."""
    sizes = sorted(costs)
    seconds = [costs[size].seconds for size in sizes]
    expected = [
        cost.flops / rate["flops"] + cost.bytes / rate["bytes"] + cost.items
        for cost in map(costs.__getitem__, sizes)
    ]
    lines = [
        f"## {AXES[name].title}",
        "",
        "| size | processor time | over the first | expected |",
        "|---|---|---|---|",
    ]
    for size, taken, work in zip(sizes, seconds, expected, strict=True):
        time_ = f"{taken:.2f} s" if taken >= 1 else f"{taken * 1e3:.3g} ms"
        ratio, expected_ratio = taken / seconds[0], work / expected[0]
        lines.append(f"| {size:,} | {time_} | {ratio:.2f} | {expected_ratio:.2f} |")
    if len(sizes) > 1:
        (all_, last), (of_all, of_last) = slopes(sizes, seconds), slopes(sizes, expected)
        lines += [
            "",
            f"Exponent {all_:.2f} (expected {of_all:.2f}); of the last two sizes {last:.2f} "
            f"(expected {of_last:.2f}).",
        ]
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"{__doc__}\nAxes: {', '.join(AXES)}")
    if unknown := set(sys.argv[2:]) - set(AXES):
        sys.exit(f"no axis {', '.join(sorted(unknown))}; there are {', '.join(AXES)}")
    file, names = Path(sys.argv[1]), sys.argv[2:] or list(AXES)
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    wanted = [("rates", 0), *((name, size) for name in names for size in AXES[name].sizes)]
    for name, size in wanted:
        key = f"{name} {size}"
        if key in found:
            continue
        with one_core(), multiprocessing.get_context("spawn").Pool(1) as pool:
            found[key] = pool.apply(measured, (name, size))
        file.write_text(json.dumps(found, indent=1))
        print(f"{key}: {found[key]}", file=sys.stderr, flush=True)
    for name in names:
        costs = {size: Cost(**found[f"{name} {size}"]) for size in AXES[name].sizes}
        print(table(name, costs, found["rates 0"]), end="\n\n")


if __name__ == "__main__":
    main()
