"""A MoE layer after its attention, for the few tokens of a decoding step on a Hopper GPU, in four
Triton kernels: starting kernels takes the time, and XLA starts thirteen.

1. `normed_logits`: the norm and the router's product. A program sums over a part of the width.
2. `dsjax.kernels.expert_choice` adds up the parts and chooses.
3. `hidden_states`: gate and up of the chosen and the shared experts, and SwiGLU. A program computes
   a few columns of one row's one expert.
4. `mixed`: the down-projections, the weighted sum, and the residual. A program computes a few
   columns of one row.

A row reads its experts' matrices by itself, in place from the stack of all layers. What several
rows read they share in the cache of the GPU at best, so this is for steps in which rows choose no
more matrices than there are; `dsjax.kernels.grouped_mixture` is for more.

A matrix unit takes 16 rows at least: fifteen of them are zeros. Reading takes the time, and it is
for products of matrix units that Triton loads what comes next ahead of time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsjax.kernels.expert_choice import power_of_two
from dsjax.kernels.few_rows import FEWEST_ROWS, MOST_ROWS, SwiGLU, padded, whole
from dsjax.kernels.target import Target
from dsjax.kernels.varying import by_hand

DEPTH, _WIDTH = 64, 32  # of the part of a matrix that is read at once
_STAGES = 6  # parts that are on their way
_ROUTER_PART = 1 << 14  # elements of the router's matrix that a program holds in registers
_MOST_EXPERTS = 256


class Matrices(NamedTuple):
    """Of the experts of all layers: gate and up [L, E, D, F], down [L, E, F, D]. Of shared experts,
    which are side by side: [L, D, X], [L, X, D].
    """

    gate: Any
    up: Any
    down: Any


class Chosen(NamedTuple):
    """Experts that rows chose, and where their matrices lie."""

    experts: Matrices
    shared: Matrices | None
    experts_MK: jax.Array  # int32
    weights_MK: jax.Array  # float32
    layer: jax.Array  # int32 scalar

    @property
    def into(self) -> list[jax.Array]:
        """Returns the stacks of gate and up, with the experts of all layers one after the other,
        then those of the shared ones.
        """
        shared = self.shared[:2] if self.shared else ()
        return [*map(_one_after_another, self.experts[:2]), *shared]

    @property
    def out(self) -> list[jax.Array]:
        """Returns the stacks of the down-projections, likewise."""
        shared = [self.shared.down] if self.shared else []
        return [_one_after_another(self.experts.down), *shared]

    @property
    def shared_width(self) -> int:
        return self.shared.gate.shape[2] if self.shared else 0


def _one_after_another(stack_LEXY: jax.Array) -> jax.Array:
    return stack_LEXY.reshape(-1, *stack_LEXY.shape[2:])


def fits(
    x_MD: jax.Array | jax.ShapeDtypeStruct, router: Any, matrices: Sequence[Any], target: Target
) -> bool:
    """Returns whether the kernels take these operands here: few rows, at most 256 experts, two-byte
    types, widths in multiples of 64, and no mesh axis left to the compiler.

    Args:
      router: the stack of the router's matrices.
      matrices: those of the experts.
    """
    return (
        target.is_hopper
        and by_hand()
        and x_MD.shape[0] <= MOST_ROWS
        and x_MD.dtype in (jnp.bfloat16, jnp.float16)
        and router.shape[-1] <= _MOST_EXPERTS
        # Small weights are no arrays.
        and all(isinstance(w, jax.Array) and w.dtype == x_MD.dtype for w in (router, *matrices))
        and all(width % DEPTH == 0 for w in matrices for width in w.shape[-2:])
    )


def normed_logits(
    x_MD: jax.Array,
    norm_LD: jax.Array,
    router_LDE: jax.Array,
    layer: jax.Array,
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Normalises by the root mean square and multiplies by the router's matrix.

    Args:
      layer: int32 scalar.
      interpret: whether to interpret the kernel, on any machine.

    Returns:
      the normed tokens [M, D] in x's dtype, and the logits' parts, float32 [X, M, E], to be summed.
    """
    (M, D), E = x_MD.shape, router_LDE.shape[2]
    most = _ROUTER_PART // power_of_two(max(E, FEWEST_ROWS))
    part = next(part for part in (4 * DEPTH, 2 * DEPTH, DEPTH) if part <= most and D % part == 0)
    n_parts = D // part
    return pl.pallas_call(
        functools.partial(_normed_logits, eps=eps, part=part),
        out_shape=(
            jax.ShapeDtypeStruct((M, D), x_MD.dtype),
            jax.ShapeDtypeStruct((n_parts, M, E), jnp.float32),
        ),
        grid=(n_parts,),
        in_specs=[whole(x) for x in (x_MD, norm_LD, router_LDE, layer[None])],
        out_specs=(
            pl.BlockSpec((M, D), lambda x: (0, 0)),
            pl.BlockSpec((n_parts, M, E), lambda x: (0, 0, 0)),
        ),
        compiler_params=triton.CompilerParams(num_warps=4 if M <= FEWEST_ROWS else 8, num_stages=2),
        name="normed_logits",
        interpret=interpret,
    )(x_MD, norm_LD, router_LDE, layer[None])


def _normed_logits(x, norm, router, layer, normed_out, logits_out, *, eps: float, part: int):
    (M, D), E = x.shape, router.shape[2]
    mine = pl.program_id(0)
    shape = padded(M), part
    row_RX, column_RX = (lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
    is_row_RX = row_RX < M

    def read(start):
        rows = x.at[row_RX, start + column_RX]
        return triton.load(rows, mask=is_row_RX, other=0.0).astype(jnp.float32)

    def add(number, total_R):
        return total_R + jnp.square(read(number * part)).sum(axis=1)

    squares_R = lax.fori_loop(0, D // part, add, jnp.zeros(shape[:1], jnp.float32))
    scale_R1 = lax.rsqrt(squares_R / D + eps)[:, None]
    weight_1X = norm[layer[0], pl.ds(mine * part, part)].astype(jnp.float32)[None]
    normed_RX = (read(mine * part) * scale_R1 * weight_1X).astype(x.dtype)
    triton.store(normed_out.at[row_RX, mine * part + column_RX], normed_RX, mask=is_row_RX)

    wide = power_of_two(max(E, FEWEST_ROWS))
    expert_XE = lax.broadcasted_iota(jnp.int32, (part, wide), 1)
    depth_XE = mine * part + lax.broadcasted_iota(jnp.int32, (part, wide), 0)
    matrix = router.at[layer[0], depth_XE, expert_XE]
    matrix_XE = triton.load(matrix, mask=expert_XE < E, other=0.0)
    logits_RE = jnp.dot(normed_RX, matrix_XE, preferred_element_type=jnp.float32)
    row_RE, expert_RE = (lax.broadcasted_iota(jnp.int32, logits_RE.shape, dim) for dim in (0, 1))
    is_logit_RE = (row_RE < M) & (expert_RE < E)
    triton.store(logits_out.at[mine, row_RE, expert_RE], logits_RE, mask=is_logit_RE)


def hidden_states(
    x_MD: jax.Array, chosen: Chosen, swiglu: SwiGLU, *, interpret: bool = False
) -> jax.Array:
    """Computes SwiGLU of each row's chosen experts, then of the shared ones, side by side.

    Args:
      x_MD: normed tokens.
      swiglu: of two float32 arrays.
      interpret: whether to interpret the kernel, on any machine.

    Returns:
      [M, K * F + X] in x's dtype.
    """
    (M, K), (_, E, _, F) = chosen.experts_MK.shape, chosen.experts.gate.shape
    width = K * F + chosen.shared_width
    operands = x_MD, chosen.experts_MK, chosen.layer[None], *chosen.into
    return pl.pallas_call(
        functools.partial(_hidden_states, n_experts=E, swiglu=swiglu),
        out_shape=jax.ShapeDtypeStruct((M, width), x_MD.dtype),
        grid=(M, width // _WIDTH),
        in_specs=[whole(x) for x in operands],
        out_specs=pl.BlockSpec((None, _WIDTH), lambda m, x: (m, x)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_STAGES),
        name="hidden_states",
        interpret=interpret,
    )(*operands)


def _hidden_states(x, experts, layer, w_gate, w_up, *rest, n_experts: int, swiglu: SwiGLU) -> None:
    *shared, out = rest
    K, F = experts.shape[1], w_gate.shape[2]
    m, block = pl.program_id(0), pl.program_id(1)

    def compute(read) -> None:
        def add(number, sums):
            depth = pl.ds(number * DEPTH, DEPTH)
            x_RX = _one_row(x, m, number * DEPTH)
            return tuple(
                total + jnp.dot(x_RX, matrix, preferred_element_type=jnp.float32)
                for total, matrix in zip(sums, read(depth), strict=True)
            )

        nothing = jnp.zeros((FEWEST_ROWS, _WIDTH), jnp.float32)
        sums = lax.fori_loop(0, x.shape[1] // DEPTH, add, (nothing, nothing))
        # The other rows are zeros. Rounded, as the products of a matrix's rows are elsewhere.
        gate, up = (total.sum(axis=0).astype(x.dtype).astype(jnp.float32) for total in sums)
        out[...] = swiglu(gate, up).astype(out.dtype)

    @pl.when(block < K * F // _WIDTH)
    def _():
        expert = layer[0] * n_experts + experts[m, lax.div(block, F // _WIDTH)]
        columns = pl.ds(lax.rem(block, F // _WIDTH) * _WIDTH, _WIDTH)
        compute(lambda depth: [w[expert, depth, columns] for w in (w_gate, w_up)])

    if shared:

        @pl.when(block >= K * F // _WIDTH)
        def _():
            columns = pl.ds((block - K * F // _WIDTH) * _WIDTH, _WIDTH)
            compute(lambda depth: [w[layer[0], depth, columns] for w in shared])


def mixed(
    x_MD: jax.Array, hidden_MX: jax.Array, chosen: Chosen, *, interpret: bool = False
) -> jax.Array:
    """Adds each row's experts, by weight, and the shared ones to the residual.

    Args:
      x_MD: the residual.
      hidden_MX: what `hidden_states` returns.
      interpret: whether to interpret the kernel, on any machine.

    Returns:
      [M, D] in x's dtype, summed in float32 and rounded once.
    """
    M, D = x_MD.shape
    choices = chosen.experts_MK, chosen.weights_MK, chosen.layer[None]
    operands = x_MD, hidden_MX, *choices, *chosen.out
    block = pl.BlockSpec((None, _WIDTH), lambda m, x: (m, x))
    return pl.pallas_call(
        functools.partial(_mixed, n_experts=chosen.experts.down.shape[1]),
        out_shape=jax.ShapeDtypeStruct((M, D), x_MD.dtype),
        grid=(M, D // _WIDTH),
        in_specs=[block, *(whole(x) for x in operands[1:])],
        out_specs=block,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_STAGES),
        name="mixed",
        interpret=interpret,
    )(*operands)


def _mixed(x, hidden, experts, weights, layer, w_down, *rest, n_experts: int) -> None:
    *shared, out = rest
    K, F = experts.shape[1], w_down.shape[1]
    m = pl.program_id(0)
    columns = pl.ds(pl.program_id(1) * _WIDTH, _WIDTH)
    per_expert = F // DEPTH

    def product(start, matrix):
        return jnp.dot(_one_row(hidden, m, start), matrix, preferred_element_type=jnp.float32)

    def add_chosen(number, total_RW):
        k = lax.div(number, per_expert)
        depth = pl.ds(lax.rem(number, per_expert) * DEPTH, DEPTH)
        matrix = w_down[layer[0] * n_experts + experts[m, k], depth, columns]
        return total_RW + weights[m, k] * product(number * DEPTH, matrix)

    total_RW = jnp.zeros((FEWEST_ROWS, _WIDTH), jnp.float32)
    total_RW = lax.fori_loop(0, K * per_expert, add_chosen, total_RW)
    for w in shared:

        def add_shared(number, total_RW, w=w):
            matrix = w[layer[0], pl.ds(number * DEPTH, DEPTH), columns]
            return total_RW + product(K * F + number * DEPTH, matrix)

        total_RW = lax.fori_loop(0, w.shape[1] // DEPTH, add_shared, total_RW)
    # The other rows are zeros.
    out[...] = (x[...].astype(jnp.float32) + total_RW.sum(axis=0)).astype(out.dtype)


def _one_row(array, m, start):
    """Reads a part of row m as the first of a matrix unit's rows, [16, 64], the others zeros."""
    shape = FEWEST_ROWS, DEPTH
    row_RX, column_RX = (lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
    return triton.load(array.at[m, start + column_RX], mask=row_RX == 0, other=0.0)
