"""A stack of layers against its layers one by one, and what its backward pass computes again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.target import HOPPER, Target
from dsjax.model import block, rope
from dsjax.model.cache import empty_cache
from dsjax.model.inputs import read_tokens
from dsjax.model.layer_cache import LayerCache
from dsjax.model.parameters import declarations
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY, tiny_model, tokens


def one_by_one(layers):
    """The layers of a stack, each without the leading dimension."""
    count = len(jax.tree.leaves(layers)[0])
    return [jax.tree.map(lambda stack, i=i: stack[i], layers) for i in range(count)]


def test_stack_runs_its_layers_in_order():
    model, row = tiny_model(), tokens(2, 24)

    @jax.jit
    def both(model):
        context = model.context(read_tokens(row, None, isolate=False, n_mtp=0))
        start_BTD = model.embed(row)
        stacked = block.run_layers(model.moe_layers, start_BTD, context, None, inner=1)
        x_BTD, outputs, counts = start_BTD, [], []
        for layer in one_by_one(model.moe_layers):
            x_BTD, statistics = layer(x_BTD, context, None)
            outputs.append(x_BTD)
            counts.append(statistics.routing.counts_E)
        return stacked, outputs, jnp.stack(counts)

    (got_BTD, statistics, inner_BTD), outputs, counts_LE = both(model)
    assert_close(got_BTD, outputs[-1], F32, "hidden")
    assert_close(inner_BTD, outputs[0], F32, "inner")
    np.testing.assert_array_equal(statistics.routing.counts_E, counts_LE)


def test_layer_that_is_not_present_changes_and_counts_nothing():
    model, row = tiny_model(), tokens(2, 24)

    @jax.jit
    def both(model, present_L):
        context = model.context(read_tokens(row, None, isolate=False, n_mtp=0))
        start_BTD = model.embed(row)
        run = lambda layers: block.run_layers(  # noqa: E731
            layers, start_BTD, context, None, present_L=present_L
        )
        loss = lambda layers: jnp.square(run(layers)[0]).sum()  # noqa: E731
        first = one_by_one(model.moe_layers)[0](start_BTD, context, None)[0]
        return run(model.moe_layers), first, jax.grad(loss)(model.moe_layers)

    (got_BTD, statistics, _), want_BTD, gradients = both(model, jnp.asarray([True, False]))
    assert_close(got_BTD, want_BTD, F32, "hidden")
    assert (np.asarray(statistics.routing.counts_E).sum(axis=1) > 0).tolist() == [True, False]
    for gradient in jax.tree.leaves(gradients):
        assert not np.asarray(gradient[1]).any()


def test_extended_stack_runs_its_layers_in_order_each_on_its_own_entries():
    row = tokens(2, 24)
    starts_B = jnp.asarray([0, 5], jnp.int32)

    @jax.jit
    def both(model):
        entries = empty_cache(TINY, 2, 64, jnp.float32).moe
        assert entries is not None
        positions_BT = starts_B[:, None] + jnp.arange(24, dtype=jnp.int32)[None]
        extension = block.Extension(positions_BT, rope.angles(positions_BT, TINY))
        start_BTD = model.embed(row)
        stacked = block.extend_layers(model.moe_layers, start_BTD, entries, extension, routing=True)
        chosen = []
        x_BTD = start_BTD
        for index, layer in enumerate(one_by_one(model.moe_layers)):
            cache = LayerCache(entries, jnp.int32(index))
            x_BTD, cache, experts_BTK = layer.extend(x_BTD, cache, extension, model.moe_layers)
            entries = cache.entries
            chosen.append(experts_BTK)
        return stacked, (x_BTD, entries, jnp.stack(chosen))

    got, want = both(tiny_model())
    for ours, one in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(ours, one, F32, "hidden state and entries")


@pytest.mark.heavy
@pytest.mark.parametrize("remat", ["selective", "full"])
def test_rematerialised_gradients_are_the_same(remat):
    config = dataclasses.replace(TINY, n_layers=2, n_dense_layers=0, n_mtp=0)
    model, row = tiny_model(config), tokens(2, 24)

    def loss(model, remat):
        return jnp.square(model.hidden(row, remat=remat).main_BTD).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got, want = gradient(model, remat), gradient(model, "none")
    for declared, g, w in zip(
        declarations(model), jax.tree.leaves(got), jax.tree.leaves(want), strict=True
    ):
        assert_close(g, w, F32, declared.path)


GPU = Target("gpu")


@pytest.mark.parametrize(
    ("target", "fp8", "remat", "most", "loops"),
    [
        (GPU, None, "none", 32, []),
        (GPU, None, "none", 1, [2]),  # too many layers
        (GPU, None, "selective", 32, [2]),
        (GPU, None, None, 32, [2]),  # nothing is kept
        (Target("cpu"), None, "none", 32, [2]),
        (GPU, "fp32", "none", 32, [2]),  # each layer is a long program
        (HOPPER, "fp32", "none", 32, []),
    ],
)
def test_layers_run_without_a_loop_on_one_gpu_where_all_is_kept(
    monkeypatch, target, fp8, remat, most, loops
):
    monkeypatch.setattr(block, "_MOST_WITHOUT_LOOP", most)
    config = dataclasses.replace(TINY, n_dense_layers=0, n_layers=2, n_mtp=0)
    model = tiny_model(config, target=target, fp8=fp8)
    traced = jax.make_jaxpr(lambda: model.hidden(tokens(2, 24), remat=remat).main_BTD)()
    scans = [each for each in traced.eqns if each.primitive.name == "scan"]
    over_layers = [scan for scan in scans if scan.params["length"] == 2]
    assert [2 for scan in over_layers if scan.params["unroll"] == 1] == loops
    assert len(over_layers) == 1


@pytest.mark.heavy
def test_gradients_without_a_loop_are_those_of_the_loop(monkeypatch):
    config = dataclasses.replace(TINY, n_dense_layers=0, n_layers=2, n_mtp=0)
    model, row = tiny_model(config, target=GPU), tokens(2, 24)

    def gradients(most):
        monkeypatch.setattr(block, "_MOST_WITHOUT_LOOP", most)
        loss = lambda model: jnp.square(model.hidden(row, remat="none").main_BTD).sum()  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.grad(loss))(model))

    for declared, g, w in zip(declarations(model), gradients(32), gradients(0), strict=True):
        assert_close(g, w, F32, declared.path)
