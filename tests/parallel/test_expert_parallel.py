"""Every transport of tokens gives what `local` gives, to the bit, whatever the imbalance.

Tokens, weights and experts are whole numbers, so that all sums are exact in any order.
"""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from dsjax.kernels.target import Target
from dsjax.parallel import expert_parallel
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.fp8 import CHANNEL_TILE, quantize_block
from tests.closeness import FP8, relative_l2

pytestmark = pytest.mark.heavy

EXPERTS, GROUPS, KEPT, K, RANKS, D = 16, 8, 2, 3, 4, 4
TOKENS = 8 * 40  # of eight devices; so many that one round is not enough for the crowd
GAINS = jnp.arange(1, EXPERTS + 1, dtype=jnp.float32)
MAX_RANKS = expert_parallel.max_ranks_per_token(EXPERTS, RANKS, K, GROUPS, KEPT)


def _choices(kind):
    """Three experts of two groups for each token; or the same for all, on one rank."""
    if kind == "crowd":
        return np.tile(np.asarray([9, 8, 11], np.int32), (TOKENS, 1))
    rng = np.random.default_rng(0)
    chosen = []
    for _ in range(TOKENS):
        kept = rng.choice(GROUPS, KEPT, replace=False)
        selectable = np.flatnonzero(np.isin(np.arange(EXPERTS) // (EXPERTS // GROUPS), kept))
        chosen.append(rng.permutation(selectable)[:K])
    return np.asarray(chosen, np.int32)


def _experts(gains_E, x_AD, sizes_E, weights_A):
    """Multiplies each expert's rows by its gain and weight; rows of no expert become NaN."""
    group_A = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(x_AD)), side="right")
    gain_A = jnp.take(gains_E, group_A, mode="clip")
    return x_AD * jnp.where(group_A < len(sizes_E), gain_A * weights_A, jnp.nan)[:, None]


def _emulated_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What the documentation of `jax.lax.ragged_all_to_all` says, with everybody's everything."""
    me = jax.lax.axis_index(axis_name)
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    operands, begins, sizes, lands = map(
        gather, (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(len(output), dtype=jnp.int32)
    for sender in range(RANKS):
        offset = row - lands[sender, me]
        mine = (offset >= 0) & (offset < sizes[sender, me])
        rows = jnp.take(operands[sender], begins[sender, me] + offset, axis=0, mode="clip")
        output = jnp.where(mine.reshape(-1, *[1] * (operand.ndim - 1)), rows, output)
    agreed = (recv_sizes == sizes[:, me]).all() & (sizes[:, me].sum() <= len(output))
    return jnp.where(agreed, output, jnp.zeros_like(output) - 1)


@functools.cache
def _program(transport, fp8, recomputed=False):
    """The mixture and its gradients on eight devices, jitted; local: on one."""
    options: Any = dict(
        n_experts=EXPERTS,
        transport=transport,
        max_ranks=MAX_RANKS,
        fp8=fp8,
        recomputed=recomputed,
    )

    def local(x, experts, weights, gains):
        compute = Partial(_experts, gains)
        y, computed = expert_parallel.mixture(
            compute, x, experts, weights, n_ranks=RANKS, **options
        )
        return y, jax.lax.psum(computed, ("data", "expert"))

    def whole(x, experts, weights, gains):
        compute = Partial(_experts, gains)
        return expert_parallel.mixture(compute, x, experts, weights, n_ranks=1, **options)

    if transport != "local":
        tokens = PartitionSpec(("data", "expert"))
        whole = jax.shard_map(
            local,
            mesh=make_mesh({"data": 2, "expert": RANKS}),
            in_specs=(tokens, tokens, tokens, PartitionSpec("expert")),
            out_specs=(tokens, PartitionSpec()),
        )

    def with_gradients(x, experts, weights, cotangent):
        def of_real(x, weights, gains):
            return whole(x, experts, weights, gains)

        y, pull, computed = jax.vjp(of_real, x, weights, GAINS, has_aux=True)
        return y, *pull(cotangent), computed

    return jax.jit(with_gradients)


def _inputs(kind, D=D):
    rng = np.random.default_rng(1)
    x, cotangent = (rng.integers(-8, 9, (TOKENS, D)).astype(np.float32) for _ in range(2))
    return x, _choices(kind), rng.integers(1, 9, (TOKENS, K)).astype(np.float32), cotangent


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("transport", ["all_gather", "all_to_all", "ragged"])
def test_every_transport_equals_local_to_the_bit(transport, recomputed, monkeypatch):
    """Evenly, in one round; all tokens to three experts of one rank, in many."""
    monkeypatch.setattr(expert_parallel.lax, "ragged_all_to_all", _emulated_ragged_all_to_all)
    for kind in ("even", "crowd"):
        *want, _ = _program("local", False)(*_inputs(kind))
        *got, computed = _program(transport, False, recomputed)(*_inputs(kind))
        assert int(computed) == TOKENS * K
        for name, g, w in zip(("y", "dx", "dweights", "dgains"), got, want, strict=True):
            np.testing.assert_array_equal(g, w, f"{kind}: {name}")


def _sent(jaxpr, in_loop=False):
    """Lists the gathers and scatters between devices, and whether each is in a loop."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("all_gather", "reduce_scatter"):
            yield name, in_loop
        for inner in jaxprs_in_params(equation.params):
            yield from _sent(inner, in_loop or name == "while")


@pytest.mark.parametrize("recomputed", [False, True])
def test_rounds_send_nothing_where_all_tokens_are_gathered(recomputed):
    program = _program("all_gather", False, recomputed).trace(*_inputs("crowd")).jaxpr
    once = {"all_gather": 4, "reduce_scatter": 3}  # choices, x, weights, dy; y, dx, dweights
    assert Counter(_sent(program.jaxpr)) == {(name, False): n for name, n in once.items()}


def test_fp8_rounds_what_is_sent_and_not_what_comes_back():
    rng = np.random.default_rng(2)
    x, choices, weights, _ = _inputs("even", D=128)
    x, cotangent = (rng.normal(size=x.shape).astype(np.float32) for _ in range(2))
    rounded_x, rounded_cotangent = (
        quantize_block(array, CHANNEL_TILE, "pow2").dequantize() for array in (x, cotangent)
    )
    got = _program("all_to_all", True)(x, choices, weights, cotangent)
    want = _program("local", False)(rounded_x, choices, weights, rounded_cotangent)
    for name, g, w in zip(("y", "dx", "dweights"), got, want, strict=False):
        assert relative_l2(g, w) < 1e-6, name
    exact = _program("local", False)(x, choices, weights, cotangent)
    assert 1e-3 < relative_l2(got[0], exact[0]) < FP8.bound


@pytest.mark.parametrize(
    ("n_ranks", "groups", "kept", "top_k", "most"),
    [
        (8, 8, 4, 8, 4),  # a group a rank
        (64, 8, 4, 8, 8),  # eight ranks a group: the experts are fewer
        (4, 8, 2, 8, 2),  # two groups a rank
        (8, 1, 1, 6, 6),  # no groups
        (2, 8, 4, 8, 2),
    ],
)
def test_ranks_of_a_token_are_bounded(n_ranks, groups, kept, top_k, most):
    assert expert_parallel.max_ranks_per_token(64, n_ranks, top_k, groups, kept) == most


def test_transport_sends_least_and_runs_on_the_target():
    assert expert_parallel.choose_transport(1, 1, Target("cpu")) == "local"
    assert expert_parallel.choose_transport(4, 4, Target("tpu")) == "all_gather"
    assert expert_parallel.choose_transport(8, 4, Target("tpu")) == "ragged"
    assert (
        expert_parallel.choose_transport(8, 4, Target("cpu"))
        == expert_parallel.choose_transport(8, 4, Target("gpu"))
        == "all_to_all"
    )
