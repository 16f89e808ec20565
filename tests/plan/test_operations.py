"""Operations of a traced program against what its shapes say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dsjax.kernels.attention import splash_attention
from dsjax.kernels.block_kernel import kernel_attention
from dsjax.kernels.grouped_matmul import grouped_matmul, grouped_outer
from dsjax.kernels.index_kernel import kernel_scores
from dsjax.kernels.target import Target
from dsjax.parallel import pipeline
from dsjax.parallel.lockstep import NONE, lock_step
from dsjax.parallel.pipeline import in_ticks
from dsjax.plan import operations
from tests.parallel import pipelines


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def count(function, *arguments, rows=0.0):
    return operations.count(jax.make_jaxpr(function)(*arguments), rows)


def test_product_counts_two_for_each_multiplication():
    batched = lambda x, y: jnp.einsum("bij,bjk->bik", x, y)  # noqa: E731
    assert count(batched, shape(3, 4, 5), shape(3, 5, 6)) == 2 * 3 * 4 * 5 * 6


def test_scan_counts_its_trips_and_a_checkpoint_its_recomputation():
    def layer(x, w):
        return jnp.sin(x @ w), None

    def loss(layer, x, ws):
        return jax.lax.scan(layer, x, ws)[0].astype(jnp.float32).sum()

    x, ws = shape(8, 16), shape(7, 16, 16)
    once = 7 * 2 * 8 * 16 * 16
    assert count(lambda x, ws: loss(layer, x, ws), x, ws) == once
    again = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
    gradient = jax.grad(lambda ws, x: loss(again, x, ws))
    assert count(gradient, ws, x) == 4 * once


def test_product_that_nobody_reads_does_not_count():
    @jax.jit
    def both(x):
        return x @ x, x + x

    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: y @ x, x)

    x = shape(4, 4)
    assert count(lambda x: both(x)[1], x) == 0
    assert count(lambda x: both(x)[0], x) == 2 * 4**3
    assert count(lambda x: (loop(x), x)[1], x) == 0
    assert count(loop, x) == 3 * 2 * 4**3


def test_conditional_counts_its_cheapest_branch():
    def maybe(go, x):
        return jax.lax.cond(go, lambda: x @ x, lambda: x)

    assert count(maybe, shape(dtype=jnp.bool_), shape(4, 4)) == 0


def test_branch_that_is_named_after_its_ticks_counts_in_those():
    same = lambda x: x  # noqa: E731

    def product(x):
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ x, same, x)  # its cheapest branch, as elsewhere
        return x @ x

    often = in_ticks(product, np.array([True, False, True, True]))

    def four_ticks(goes, x):
        return jax.lax.scan(lambda x, go: (jax.lax.cond(go, often, same, x), None), x, goes)[0]

    assert count(four_ticks, shape(4, dtype=jnp.bool_), shape(8, 8)) == 3 * 2 * 8**3


@pytest.mark.parametrize("name", ["1f1b", "dualpipe"])
def test_pipeline_counts_what_ranks_in_step_compute(name):
    """A stage forward is 2 products of 2 * 3 * 16 * 16, a backward of 3 times as many."""
    ranks, microbatches, width = 4, 8, 16
    schedule = pipelines.build(name, ranks, microbatches)
    args = pipelines.arrays(ranks, microbatches)
    specs = pipelines.specs(*args[:2], ranks)
    mesh = AbstractMesh((4,), ("pipe",), axis_types=(AxisType.Auto,))
    table = lock_step(schedule)
    ticks = [
        (work.microbatch != NONE).any(axis=1).sum() for work in (table.forward, table.backward)
    ]
    product = 2 * 3 * width**2
    # On each rank: `enter` of its micro-batches, with one product, forward and for its weight;
    # `leave` with 2 products, forward, and twice for gradients. All of that is once per group.
    groups = microbatches // ranks
    ends = groups * (1 + 1 + 1 + 2 * 3)
    stages = ticks[0] * 2 + ticks[1] * 2 * 3
    with jax.sharding.use_abstract_mesh(mesh):
        found = count(lambda *args: pipeline.run(schedule, pipelines.PIECES, *args, specs), *args)
    assert found == ranks * product * (stages + ends)


def test_sharded_part_counts_on_every_device():
    mesh = AbstractMesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    both = PartitionSpec(("fsdp", "expert"))
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(both, PartitionSpec()), out_specs=both
    )
    assert count(product, shape(16, 8), shape(8, 8)) == 2 * 16 * 8 * 8


@pytest.mark.parametrize("rows", [32.0, 1e9])
def test_grouped_product_counts_the_rows_of_an_even_load(rows):
    x, w, y = shape(1024, 256), shape(4, 256, 128), shape(1024, 128)
    sizes = shape(4, dtype=jnp.int32)
    want = 2 * min(4 * rows, 1024) * 256 * 128
    forward = lambda x, w, sizes: grouped_matmul(x, w, sizes, Target("tpu"))  # noqa: E731
    outer = lambda x, y, sizes: grouped_outer(x, y, sizes, Target("tpu"))  # noqa: E731
    assert count(forward, x, w, sizes, rows=rows) == want
    assert count(outer, x, y, sizes, rows=rows) == want
    layers = shape(12, 256, 128)
    second = lambda x, w, sizes: grouped_matmul(x, w, sizes, Target("tpu"), first=jnp.int32(4))  # noqa: E731
    assert count(second, x, layers, sizes, rows=rows) == want


def test_kernels_of_sparse_attention_count_what_they_multiply():
    places = shape(1, 16, dtype=jnp.int32)
    scores = count(kernel_scores, shape(2, 16, 8, 32), shape(2, 16, 8), shape(2, 256, 32), places)
    assert scores == 2 * (2 * 16 * 8 * 256) * (32 + 1)
    keys, values = shape(3, 2, 4, 128, 32), shape(3, 2, 4, 128, 16)
    table, places = (shape(2, 16, *more, dtype=jnp.int32) for more in ((4, 5), ()))
    attend = partial(kernel_attention, size=16, scale=1.0)
    layer = shape(dtype=jnp.int32)
    blocks = count(attend, shape(2, 16, 4, 8, 32), keys, values, layer, table, places)
    assert blocks == 2 * (2 * 16 * 4 * 8) * (5 * 16) * (32 + 16)


def test_each_rank_of_a_pipeline_has_the_rows_of_a_whole_pass():
    mesh = AbstractMesh((2,), ("pipe",), axis_types=(AxisType.Auto,))
    product = jax.shard_map(
        lambda *arrays: grouped_matmul(*arrays, Target("tpu")),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    arrays = shape(1024, 256), shape(4, 256, 128), shape(4, dtype=jnp.int32)
    assert count(product, *arrays, rows=32.0) == 2 * (2 * 4 * 32 * 256 * 128)


def test_causal_attention_counts_half_of_the_square():
    q, k, v = shape(2, 512, 4, 192), shape(2, 512, 4, 192), shape(2, 512, 4, 128)
    square = 2 * 4 * 512**2

    def attention(q, k, v):
        return splash_attention(q, k, v, 0.1, None)

    def loss(q, k, v):
        return attention(q, k, v).astype(jnp.float32).sum()

    assert count(attention, q, k, v) == square * (192 + 128)
    both = square * (192 + 128) + square * (3 * 192 + 2 * 128)
    both += 2 * square // 512 * 128  # output times its gradient
    assert count(jax.grad(loss, (0, 1, 2)), q, k, v) == both
