"""Sparse against dense attention of one layer: a token and chunks of a prompt that extend a long
cache, a training step, the memory of a long prompt, and NSA's decode step.

Both sides are ours, of the same widths. Sides take turns.

Decoding should reach 60 % of the ratio of the bytes that both read, prefill half of the ratio of
their operations, a training step of the sparse stage the speed of a dense one. What V3.2's decoding
reads is the cache; what NSA's does, of few rows, is as much the weights of the layer. A prompt's
time is that of chunks at even distances, times their number. Times on a CPU are those of the
processor, which other work disturbs less than the clock's; they tell most on one core.

Random weights choose keys at random, so neighbouring queries share none: the worst case.

Run: python -m tests.bench.bench_sparse [decode] [prefill] [train] [memory] [nsa]  (default: all)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.model import rope
from dsjax.model.block import attention_class
from dsjax.model.indexer import Indexer
from dsjax.model.layer_cache import LayerCache
from dsjax.model.mla import MLA
from dsjax.model.nsa import pattern
from dsjax.model.parameters import initialize
from dsjax.model.sparse_mla import SparseMLA
from dsjax.precision.policy import Policy
from tests.bench.sides import machine, median_seconds, seconds

CHUNK, CHUNKS = 512, 4
DENSE = ModelConfig(
    vocab_size=64,
    dim=512,
    n_layers=1,
    n_dense_layers=1,
    n_heads=16,
    inter_dim=64,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    max_seq_len=1 << 17,
)
SPARSE = dataclasses.replace(DENSE, index_n_heads=8, index_head_dim=32, index_topk=2048)
SIDES = {"dense": DENSE, "sparse": SPARSE}
# One of the four groups of heads of NSA's paper, with narrower heads.
NATIVE = ModelConfig(
    vocab_size=64,
    dim=512,
    n_layers=1,
    n_dense_layers=1,
    n_heads=16,
    n_kv_heads=1,
    head_dim=64,
    inter_dim=64,
    attention="nsa",
    max_seq_len=1 << 17,
)
GROUPED = dataclasses.replace(NATIVE, attention="gqa")
LENGTHS, TRAINED, STEPS = (32768, 65536), 16384, 2
ROWS = (1, 4)  # of NSA's decode step


def extension(
    config: ModelConfig, length: int, tokens: int, start: int, rows: int = 1
) -> Callable[[], float]:
    """A layer that adds tokens at `start` to a cache full of random entries.

    As in a model it is one of several, and which one is not known to the compiler: XLA on a CPU
    otherwise writes the new entries into copies of the cache, eight of them for grouped queries.
    """
    kind = attention_class(config)
    layer = initialize(kind(config, Policy(jnp.float32)), jax.random.key(0))
    rng = np.random.default_rng(0)
    entries = {
        name: jnp.asarray(
            rng.normal(size=(2, rows, shape.heads, length // shape.every, shape.width)),
            jnp.float32,
        )
        for name, shape in kind.cached(config).items()
    }
    x_BTD = jnp.asarray(rng.normal(size=(rows, tokens, config.dim)), jnp.float32)
    positions_BT = start + jnp.tile(jnp.arange(tokens, dtype=jnp.int32), (rows, 1))

    @functools.partial(jax.jit, donate_argnums=1)
    def extend(layer, entries, positions_BT, index):
        angles = rope.angles(positions_BT, config)
        cache = LayerCache(entries, index)
        y_BTD, cache = layer.extend(x_BTD, angles, cache, positions_BT)
        return y_BTD, cache.entries

    def run() -> float:
        nonlocal entries
        y_BTD, entries = jax.block_until_ready(extend(layer, entries, positions_BT, jnp.int32(1)))
        return float(np.asarray(y_BTD)[0, 0, 0])

    return run


def decode_bytes(config: ModelConfig, length: int) -> int:
    """Bytes of the cache that one token reads, float32."""
    latents = config.kv_lora_rank + config.qk_rope_head_dim
    read = latents * min(config.index_topk or length, length)
    return 4 * (read + config.index_head_dim * length)


def chunk_flops(config: ModelConfig, position: int) -> float:
    """Operations of attention from one query at a position, in the form that it runs in."""
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    heads = config.qk_head_dim + config.v_head_dim
    expansion = C * (config.qk_nope_head_dim + config.v_head_dim) / CHUNK
    dense = 2 * config.n_heads * (heads + expansion) * position
    if not config.index_topk or position < config.index_topk:
        return dense
    chosen = 2 * config.n_heads * (2 * C + R) * config.index_topk
    return Indexer.score_flops(config) * position + chosen


def compare(
    what: str,
    sides: dict[str, list[Callable[[], float]]],
    wanted: float,
    share: float,
    rounds: int = 9,
) -> None:
    """Prints how much faster the sparse side is than the dense one, and the ratio of their work."""
    names = {f"{name} {n}": run for name, runs in sides.items() for n, run in enumerate(runs)}
    times = median_seconds(names, rounds, clock())
    dense, sparse = (
        sum(taken for name, taken in times.items() if name.startswith(side)) for side in sides
    )
    print(
        f"{what}: dense {1e3 * dense:.1f} ms, sparse {1e3 * sparse:.1f} ms: {dense / sparse:.2f} "
        f"times as fast; {share:.0%} of the ratio {wanted:.2f} of the work is {share * wanted:.2f}"
    )


def training(config: ModelConfig) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
    """A layer's loss and gradient over a whole sequence, and its inputs."""
    sparse = bool(config.index_topk)
    kind = SparseMLA if sparse else MLA
    layer = initialize(kind(config, Policy(jnp.float32)), jax.random.key(0))
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(1, TRAINED, config.dim)), jnp.float32)
    angles = rope.angles(jnp.arange(TRAINED, dtype=jnp.int32)[None], config)

    def loss(state, x_BTD):
        layer = nnx.merge(graph, state)
        if not sparse:
            return jnp.square(layer(x_BTD, angles)).mean()
        y_BTD, divergence_BT = layer.learn(x_BTD, angles, None, "sparse")
        return jnp.square(y_BTD).mean() + divergence_BT.mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step.lower(state, x_BTD).compile(), (state, x_BTD)


def clock() -> Callable[[], float]:
    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def train() -> None:
    def run(step: jax.stages.Compiled, inputs: tuple[Any, ...]) -> None:
        jax.block_until_ready(step(*inputs))

    sides = {"dense": training(DENSE), "sparse": training(SPARSE)}
    for name, (step, _) in sides.items():  # the dense one may be more than there is
        temporary = step.memory_analysis().temp_size_in_bytes / 2**30
        print(f"training step at {TRAINED:,}, {name}: {temporary:.2f} GiB", flush=True)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(STEPS):
        for name, (step, inputs) in sides.items():
            times[name].append(seconds(run, step, inputs, clock=clock()))
    for name, taken in times.items():
        print(f"training step at {TRAINED:,}, {name}: {', '.join(f'{t:.1f}' for t in taken)} s")
    ratio = min(times["dense"]) / min(times["sparse"])
    print(f"training step: {ratio:.2f} times as fast; 1 is wanted")


def memory() -> None:
    """Prints what XLA allots to a whole prompt beside its inputs and outputs."""
    for length in (LENGTHS[0] // 2, *LENGTHS):
        layer = SparseMLA(SPARSE, Policy(jnp.float32))
        layer = jax.eval_shape(lambda layer=layer: initialize(layer, jax.random.key(0)))
        x_BTD = jax.ShapeDtypeStruct((1, length, SPARSE.dim), jnp.float32)

        def attend(layer, x_BTD, length=length):
            positions_BT = jnp.arange(length, dtype=jnp.int32)[None]
            return layer(x_BTD, rope.angles(positions_BT, SPARSE))

        used = jax.jit(attend).lower(layer, x_BTD).compile().memory_analysis().temp_size_in_bytes
        print(f"memory of {length:,} tokens: {used / 2**20:.0f} MiB, {used / length:.0f} B a token")


def decode() -> None:
    for length in LENGTHS:
        ends = {name: [extension(c, length, 1, length - 1)] for name, c in SIDES.items()}
        ratio = decode_bytes(DENSE, length) / decode_bytes(SPARSE, length)
        compare(f"decode at {length:,}", ends, ratio, 0.6)


def prefill() -> None:
    for length in LENGTHS:
        starts = [(2 * n + 1) * length // (2 * CHUNKS) // CHUNK * CHUNK for n in range(CHUNKS)]
        parts = {
            name: [extension(c, length, CHUNK, start) for start in starts]
            for name, c in SIDES.items()
        }
        work = [sum(chunk_flops(c, start) for start in starts) for c in SIDES.values()]
        compare(
            f"{CHUNKS} chunks of {CHUNK} up to {length:,}", parts, work[0] / work[1], 0.5, rounds=3
        )


def nsa() -> None:
    sizes = pattern(NATIVE)
    for rows, length in itertools.product(ROWS, LENGTHS):
        fewer = length // sizes.stride + sizes.blocks * sizes.size + sizes.window
        sides = {"dense": (GROUPED, length), "sparse": (NATIVE, fewer)}
        ends = {
            name: [extension(config, length, 1, length - 1, rows)]
            for name, (config, _) in sides.items()
        }
        # Keys and values of each row, and the weights of the layer once.
        numbers = [
            parameters(config) + rows * read * 2 * NATIVE.head_dim
            for config, read in sides.values()
        ]
        what = f"NSA, decode at {length:,}, batch {rows}"
        compare(what, ends, numbers[0] / numbers[1], 0.6)


def parameters(config: ModelConfig) -> int:
    """Counts the weights of a layer's attention."""
    kind = attention_class(config)
    layer = jax.eval_shape(lambda: initialize(kind(config, Policy(jnp.float32)), jax.random.key(0)))
    return sum(weight.size for weight in jax.tree.leaves(layer))


def main() -> None:
    print(machine())
    parts = {part.__name__: part for part in (decode, prefill, train, memory, nsa)}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
