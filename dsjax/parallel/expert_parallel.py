"""Experts on several devices: bringing tokens to the devices of their experts, and sums back.

Everything here runs inside `shard_map`, where a device has m tokens and e experts of its own, those
from rank * e on; its rank is its place along the mesh axis `expert`. `mixture` is the interface.
How tokens travel is its argument `transport`:

* local: not at all; for a single rank, and the definition that the others must equal.
* all_gather: every rank gets all tokens and keeps those that chose its experts. Sends ranks - 1
  copies per token, which is best while a token has no fewer destinations.
* all_to_all: a bucket of fixed size per pair of ranks. Runs everywhere.
* ragged: `lax.ragged_all_to_all` sends exactly the rows there are. XLA lacks it on CPUs.

As in DeepEP, a token travels once to each rank that holds any of its experts, with its expert ids
and weights, and that rank returns one sum. Routers that keep few groups of experts thereby bound
the traffic, since a group lies on neighbouring ranks (`max_ranks_per_token`; DeepSeek-V3,
arXiv:2412.19437, section 2.1.2). With `fp8`, what is sent forward (activations in the forward pass,
gradients in the backward pass) is E4M3 in 1 x 128 tiles with power-of-two scales; what is returned
is not (section 3.3.3).

No token is dropped. Shapes are static, so a rank computes a bounded number of rows at once: `SLACK`
times those of an even load. Overflow rows are processed in further rounds of dispatch, experts and
combine, a loop that runs as often as the batch at hand needs: in the worst case all tokens go to
one expert. Memory is thus bounded by `SLACK`, whatever the router does. The backward pass of that
loop is a loop too, which computes each round again. The first round stands before the loop, so that
it keeps for the backward pass what the model's rematerialisation says; if that keeps nothing, it is
part of the loop, and the program half as long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jax.typing import DTypeLike

from dsjax.kernels.target import Target
from dsjax.kernels.varying import varies_over, vary_as
from dsjax.parallel.routing_plan import (
    Plan,
    bucket_by_expert,
    combine,
    dispatch,
    dispatch_choices,
    sort_by_expert,
    undispatch,
)
from dsjax.precision.fp8 import CHANNEL_TILE, BlockScaled, quantize_block

Transport = Literal["local", "all_gather", "all_to_all", "ragged"]
# What a rank has in a round: tokens [R, D], their experts [R, K] (from 0 on for this rank's, e for
# others), weights [R, K], and a function that turns the sums [R, D] into the round's part of what
# all rounds add up.
Sent = tuple[jax.Array, jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]

_AXIS = "expert"
SLACK = 1.5  # rows that a rank computes at once, relative to an even load
_FEW_ROWS = 64  # per rank, or per pair of ranks; so few are never worth a second round


def choose_transport(n_ranks: int, max_ranks: int, target: Target) -> Transport:
    """Chooses the transport that sends least and runs on the target."""
    if n_ranks == 1:
        return "local"
    if n_ranks <= max_ranks:
        return "all_gather"
    return "ragged" if target.kind == "tpu" else "all_to_all"


def max_ranks_per_token(
    n_experts: int, n_ranks: int, top_k: int, n_groups: int, n_kept: int
) -> int:
    """Bounds the ranks that hold experts of one token, which chooses among `n_kept` groups."""
    per_rank, per_group = n_experts // n_ranks, n_experts // n_groups
    if per_rank % per_group == 0:
        ranks_per_group = 1
    elif per_group % per_rank == 0:
        ranks_per_group = per_group // per_rank
    else:
        ranks_per_group = -(-per_group // per_rank) + 1
    return min(top_k, n_ranks, n_kept * ranks_per_group)


def mixture(
    experts: Partial,
    x_mD: jax.Array,
    experts_mK: jax.Array,
    weights_mK: jax.Array,
    *,
    n_experts: int,
    n_ranks: int,
    transport: Transport,
    max_ranks: int,
    fp8: bool = False,
    recomputed: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Sends tokens to their experts and sums the results.

    Args:
      experts: this rank's: (rows [A, D] sorted by expert, int32 [e] rows per expert, float32 [A]
        weight of each row in its token's sum) -> weighted rows [A, D]. Arrays that it needs are
        its leaves.
      experts_mK: int32, below `n_experts`, distinct for each token.
      weights_mK: float32.
      max_ranks: `max_ranks_per_token`.
      recomputed: whether the backward pass computes all of this again, the first round too.

    Returns:
      [m, D] in x's dtype, and the number of assignments that this rank's experts computed, int32.
    """
    if transport == "local":
        local = sort_by_expert(experts_mK, n_experts)
        return _compute(experts, x_mD, weights_mK, local), local.sizes_E.sum()

    per_rank = n_experts // n_ranks
    if transport == "all_gather":
        exchange = _ExchangeAll.of(x_mD, experts_mK, per_rank, n_ranks, fp8)
    else:
        exchange = _ExchangeSome.of(transport, x_mD, experts_mK, per_rank, n_ranks, max_ranks, fp8)
    given = experts, *exchange.before(x_mD, weights_mK)
    if recomputed and exchange.most_rounds > 1:
        summed: Any = _rounds_from(0, given, exchange)
    else:
        summed = _round(0, *given, exchange)
        if exchange.most_rounds > 1:
            summed = jax.tree.map(jnp.add, summed, _rounds_from(1, given, exchange))
    y, computed = summed
    return exchange.after(y).astype(x_mD.dtype), computed


def _compute(experts: Partial, x_RD: jax.Array, weights_RK: jax.Array, here: Plan) -> jax.Array:
    weights_A = dispatch_choices(weights_RK.T, here)
    return combine(experts(dispatch(x_RD, here), here.sizes_E, weights_A), here)


def _round(
    index: jax.Array | int,
    experts: Partial,
    x: jax.Array,
    weights: jax.Array,
    exchange: _ExchangeAll | _ExchangeSome,
) -> tuple[jax.Array, jax.Array]:
    """Returns a round's part of what the rounds add up, from what `before` gave."""
    x_RD, experts_RK, weights_RK, return_sums = exchange.send_tokens(index, x, weights)
    here = sort_by_expert(experts_RK, exchange.per_rank, min(exchange.rows, experts_RK.size))
    return return_sums(_compute(experts, x_RD, weights_RK, here)), here.sizes_E.sum()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds_from(
    first: int,
    given: tuple[Partial, jax.Array, jax.Array],
    exchange: _ExchangeAll | _ExchangeSome,
) -> tuple[jax.Array, jax.Array]:
    """Adds up the rounds that the batch needs, from `first` on."""
    _, x, _ = given
    zeros = vary_as(jnp.zeros(x.shape, exchange.sums_dtype(x)), *jax.tree.leaves(given))
    start = zeros, vary_as(jnp.int32(0), x)
    return _add_up(lambda index: _round(index, *given, exchange), start, first, exchange.n_rounds)


def _rounds_backward(first: int, residuals: Any, cotangents: Any) -> tuple[Any, None]:
    given, exchange = residuals
    dy, _ = cotangents

    def gradients(index: jax.Array) -> Any:
        def sums(experts: Partial, x: jax.Array, weights: jax.Array) -> jax.Array:
            return _round(index, experts, x, weights, exchange)[0]

        return jax.vjp(sums, *given)[1](dy)

    start = jax.tree.map(lambda x: vary_as(jnp.zeros_like(x), x), given)
    return _add_up(gradients, start, first, exchange.n_rounds), None


_rounds_from.defvjp(
    lambda first, given, exchange: (_rounds_from(first, given, exchange), (given, exchange)),
    _rounds_backward,
)


def _add_up(
    function: Callable[[jax.Array], Any], start: Any, first: int, n_rounds: jax.Array
) -> Any:
    """Adds function(index) to `start` for all indices from `first` to `n_rounds`."""

    def add(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, total = state
        return index + 1, jax.tree.map(jnp.add, total, function(index))

    def loop(start: Any) -> Any:
        return lax.while_loop(lambda state: state[0] < n_rounds, add, (jnp.int32(first), start))[1]

    # Later rounds are for uneven loads: whoever counts operations takes a loop as one round, and of
    # a conditional the cheapest branch (`dsjax.plan`).
    return loop(start) if first == 0 else lax.cond(n_rounds > first, loop, lambda x: x, start)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["experts_RK", "turn_R", "n_rounds"],
    meta_fields=["most_rounds", "rows", "per_rank", "fp8"],
)
@dataclasses.dataclass(frozen=True)
class _ExchangeAll:
    """Every rank sees all tokens and in each round computes those whose turn it is there.

    They are gathered before the rounds, and their sums are scattered after them: nothing is sent in
    a round, however many there are. (Nor does the TPU's compiler accept a reduce-scatter whose
    result a loop adds up in another type.)
    """

    experts_RK: jax.Array  # int32, this rank's from 0 on, `per_rank` for other ranks'
    turn_R: jax.Array  # int32, the round of each token here
    n_rounds: jax.Array  # int32, rounds that this batch needs
    most_rounds: int  # rounds that the worst imbalance needs
    rows: int  # assignments that a rank computes at most in a round
    per_rank: int
    fp8: bool

    @classmethod
    def of(
        cls,
        x_mD: jax.Array,
        experts_mK: jax.Array,
        per_rank: int,
        n_ranks: int,
        fp8: bool,
    ) -> _ExchangeAll:
        most_each = min(experts_mK.shape[1], per_rank)
        at_once, most_rounds = _divide(experts_mK.size, n_ranks * len(x_mD) * most_each)
        experts_RK = _here(_move("all_gather", True, experts_mK, None), per_rank)
        n_R = (experts_RK < per_rank).sum(axis=1, dtype=jnp.int32)
        turn_R = (jnp.cumsum(n_R) - n_R) // at_once
        n_rounds = _rounds(jnp.where(n_R > 0, turn_R, 0).max() + 1, x_mD)
        rows = at_once + most_each - 1
        return cls(experts_RK, turn_R, n_rounds, most_rounds, rows, per_rank, fp8)

    def before(self, x_mD: jax.Array, weights_mK: jax.Array) -> tuple[jax.Array, jax.Array]:
        # x[m, D] -> all_gather(expert) -> x[R, D]
        x_RD = send("all_gather", True, self.fp8, x_mD, None)
        return x_RD, send("all_gather", True, False, weights_mK, None)

    def after(self, y_RD: jax.Array) -> jax.Array:
        # y[R, D] -> psum_scatter(expert) -> y[m, D]
        return send("all_gather", False, self.fp8, y_RD, None)

    def sums_dtype(self, x_RD: jax.Array) -> DTypeLike:
        return x_RD.dtype  # a token has one turn here: to its sum the other rounds add 0

    def send_tokens(self, index: jax.Array | int, x_RD: jax.Array, weights_RK: jax.Array) -> Sent:
        due_RK = jnp.where((self.turn_R == index)[:, None], self.experts_RK, self.per_rank)
        return x_RD, due_RK, weights_RK, lambda y_RD: y_RD


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["experts_mK", "all_ranks_mN", "turn_mN", "n_rounds"],
    meta_fields=["transport", "most_rounds", "at_once", "rows", "per_rank", "n_ranks", "fp8"],
)
@dataclasses.dataclass(frozen=True)
class _ExchangeSome:
    """In each round every rank sends the tokens whose turn it is at their destination."""

    experts_mK: jax.Array  # int32
    all_ranks_mN: jax.Array  # int32, each token's destinations, then `n_ranks`
    turn_mN: jax.Array  # int32, its round at each
    n_rounds: jax.Array  # int32, rounds that this batch needs
    transport: Transport
    most_rounds: int  # rounds that the worst imbalance needs
    at_once: int  # rows of a round at a rank (ragged), or from one rank to another (all_to_all)
    rows: int  # assignments that a rank computes at most in a round
    per_rank: int
    n_ranks: int
    fp8: bool

    @classmethod
    def of(
        cls,
        transport: Transport,
        x_mD: jax.Array,
        experts_mK: jax.Array,
        per_rank: int,
        n_ranks: int,
        max_ranks: int,
        fp8: bool,
    ) -> _ExchangeSome:
        most_each = min(experts_mK.shape[1], per_rank)
        rank_mK = experts_mK // per_rank
        n_mE = jax.nn.one_hot(rank_mK, n_ranks, dtype=jnp.int32).sum(axis=1)
        start_mE = jnp.cumsum(n_mE, axis=0) - n_mE
        if transport == "ragged":
            # The rows of all ranks lie one after the other, so each rank must know where its own
            # start.
            n_EE = lax.all_gather(n_mE.sum(axis=0), _AXIS)
            before_EE = jnp.cumsum(n_EE, axis=0) - n_EE
            start_mE = start_mE + before_EE[lax.axis_index(_AXIS)][None]
            buckets, sources, average = 1, n_ranks, experts_mK.size
        else:
            buckets, sources, average = n_ranks, 1, experts_mK.size / n_ranks
        at_once, most_rounds = _divide(average, sources * len(x_mD) * most_each)
        all_ranks_mN = _destinations(rank_mK, n_ranks)[:, :max_ranks]
        start_mN = jnp.take_along_axis(start_mE, jnp.minimum(all_ranks_mN, n_ranks - 1), axis=1)
        turn_mN = jnp.where(all_ranks_mN < n_ranks, start_mN // at_once, 0)
        n_rounds = _rounds(turn_mN.max() + 1, x_mD)
        rows = buckets * (at_once + most_each - 1)
        arrays = experts_mK, all_ranks_mN, turn_mN, n_rounds
        return cls(*arrays, transport, most_rounds, at_once, rows, per_rank, n_ranks, fp8)

    def before(self, x_mD: jax.Array, weights_mK: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x_mD, weights_mK

    def after(self, y_mD: jax.Array) -> jax.Array:
        return y_mD

    def sums_dtype(self, x_mD: jax.Array) -> DTypeLike:
        return jnp.float32  # a token's sums come from several ranks

    def send_tokens(self, index: jax.Array | int, x_mD: jax.Array, weights_mK: jax.Array) -> Sent:
        transport, fp8 = self.transport, self.fp8
        ranks_mN = jnp.where(self.turn_mN == index, self.all_ranks_mN, self.n_ranks)
        if transport == "ragged":
            out = sort_by_expert(ranks_mN, self.n_ranks)
            route = _Route.of(out.sizes_E, ranks_mN.size, self.at_once)
        else:
            out, route = bucket_by_expert(ranks_mN, self.n_ranks, self.at_once), None
        # x[m, D] -> dispatch -> x[S, D] -> all_to_all(expert) -> x[R, D]
        x_RD = send(transport, True, fp8, dispatch(x_mD, out), route)
        weights_RK = send(transport, True, False, dispatch(weights_mK, out), route)
        # Rows that no rank fills arrive as 0, which must not be an expert.
        sent_SK = jnp.take(self.experts_mK + 1, out.tokens_A, axis=0, mode="fill", fill_value=0)
        experts_RK = _here(_move(transport, True, sent_SK, route) - 1, self.per_rank)

        def return_sums(y_RD: jax.Array) -> jax.Array:
            # y[R, D] -> all_to_all(expert) -> y[S, D] -> undispatch, sum -> y[m, D]
            y_SD = send(transport, False, fp8, y_RD, route)
            return undispatch(y_SD, out).astype(jnp.float32).sum(axis=0)

        return x_RD, experts_RK, weights_RK, return_sums


def _divide(average: float, worst: int) -> tuple[int, int]:
    """Returns the rows per round, and the rounds that the worst imbalance needs."""
    at_once = min(max(int(-(-SLACK * average // 1)), _FEW_ROWS), worst)
    return at_once, -(-worst // at_once)


def _rounds(n_rounds: jax.Array, x_mD: jax.Array) -> jax.Array:
    """Returns the most rounds of any rank: all ranks must take part in each."""
    return lax.pmax(n_rounds, tuple(varies_over(n_rounds, x_mD)))


def _here(experts_RK: jax.Array, per_rank: int) -> jax.Array:
    """Numbers this rank's experts from 0; others become `per_rank`."""
    local_RK = experts_RK - lax.axis_index(_AXIS) * per_rank
    return jnp.where((local_RK >= 0) & (local_RK < per_rank), local_RK, per_rank)


def _destinations(rank_mK: jax.Array, n_ranks: int) -> jax.Array:
    """Lists each rank of a token once, in ascending order, then `n_ranks`."""
    sorted_mK = jnp.sort(rank_mK, axis=1)
    repeated = jnp.pad(sorted_mK[:, 1:] == sorted_mK[:, :-1], ((0, 0), (1, 0)))
    return jnp.sort(jnp.where(repeated, n_ranks, sorted_mK), axis=1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sizes", "sent", "received"],
    meta_fields=["rows_sent", "rows_received"],
)
@dataclasses.dataclass(frozen=True)
class _Route:
    """Where the rows of a ragged exchange lie: int32 [sender, receiver], the same on every rank."""

    sizes: jax.Array
    sent: jax.Array  # first row in the sender's array
    received: jax.Array  # first row in the receiver's array
    rows_sent: int  # sizes of these arrays
    rows_received: int

    @classmethod
    def of(cls, sizes_E: jax.Array, rows_sent: int, rows_received: int) -> _Route:
        sizes = lax.all_gather(sizes_E, _AXIS)
        sent, received = jnp.cumsum(sizes, axis=1) - sizes, jnp.cumsum(sizes, axis=0) - sizes
        return cls(sizes, sent, received, rows_sent, rows_received)


def _move(transport: Transport, forward: bool, x: jax.Array, route: _Route | None) -> jax.Array:
    """Sends rows to other ranks, or back; each is the transpose of the other."""
    if transport == "all_to_all":
        return lax.all_to_all(x, _AXIS, 0, 0, tiled=True)
    if transport == "all_gather":
        if forward:
            return lax.all_gather(x, _AXIS, axis=0, tiled=True)
        return lax.psum_scatter(x, _AXIS, scatter_dimension=0, tiled=True)
    assert route is not None
    me = lax.axis_index(_AXIS)
    outgoing, incoming = (route.sizes[me], route.sizes[:, me])
    begins, lands, rows = route.sent[me], route.received[me], route.rows_received
    if not forward:
        outgoing, incoming = incoming, outgoing
        begins, lands, rows = route.received[:, me], route.sent[:, me], route.rows_sent
    room = vary_as(jnp.zeros((rows, *x.shape[1:]), x.dtype), x, outgoing)
    return lax.ragged_all_to_all(x, room, begins, outgoing, lands, incoming, axis_name=_AXIS)


def _send(
    transport: Transport, forward: bool, fp8: bool, x: jax.Array, route: _Route | None
) -> jax.Array:
    """Does what `_move` does; with `fp8`, what goes forward is E4M3, in the backward pass too."""
    if not (forward and fp8):
        return _move(transport, forward, x, route)
    sent = quantize_block(x, CHANNEL_TILE, "pow2")
    bits = lax.bitcast_convert_type(sent.values, jnp.uint8)
    values = lax.bitcast_convert_type(_move(transport, forward, bits, route), sent.values.dtype)
    scales = _move(transport, forward, sent.scales, route)
    return BlockScaled(values, scales, sent.block).dequantize(x.dtype)


send = jax.custom_vjp(_send, nondiff_argnums=(0, 1, 2))
send.defvjp(
    lambda transport, forward, fp8, x, route: (_send(transport, forward, fp8, x, route), route),
    lambda transport, forward, fp8, route, dy: (send(transport, not forward, fp8, dy, route), None),
)


def gather_weight(w: jax.Array, dim: int, axes: tuple[str, ...], dtype: DTypeLike) -> jax.Array:
    """Gathers a weight whose dimension `dim` is split over mesh axes.

    It is sent as `dtype`, in which it is used, and returned in w's own type, so that its gradient
    is of that type too: w[d_fsdp, F] -> all_gather(fsdp) -> w[D, F], backward psum_scatter.
    """
    return _gather_weight(w, dim, axes, dtype) if axes else w


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_weight(w, dim, axes, dtype):
    return lax.all_gather(w.astype(dtype), axes, axis=dim, tiled=True).astype(w.dtype)


def _gather_weight_backward(dim, axes, dtype, _, dw):
    return (lax.psum_scatter(dw, axes, scatter_dimension=dim, tiled=True),)


_gather_weight.defvjp(
    lambda w, dim, axes, dtype: (_gather_weight(w, dim, axes, dtype), None), _gather_weight_backward
)
