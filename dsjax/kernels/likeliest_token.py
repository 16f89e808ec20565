"""The most likely token after each of a decoding step's few rows, for Hopper GPUs, in two Triton
kernels: the final norm, the product with the head and the maximum. XLA starts five, and writes the
logits to memory.

1. A program multiplies by a few columns of the head and keeps each row's greatest logit of them.
2. A program compares a row's.

Of equal logits the lowest id is taken, as by `jnp.argmax`. A logit that is not a number counts as
infinite, so that an id comes out in any case.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsjax.kernels.expert_choice import power_of_two
from dsjax.kernels.few_rows import columns_of_program, padded, product, whole
from dsjax.kernels.few_rows import fits as fits_few_rows
from dsjax.kernels.target import Target

_STAGES = 3  # reads that are under way


def fits(n_rows: int, head_DV: Any, dtype: Any, target: Target) -> bool:
    """Returns whether the kernels take these operands here: those of `few_rows`.

    Args:
      head_DV: the head's matrix as it lies in memory.
      dtype: of the rows.
    """
    return isinstance(head_DV, jax.Array) and fits_few_rows(n_rows, [head_DV[None]], dtype, target)


def likeliest_token(
    x_MD: jax.Array,
    norm_D: jax.Array,
    head_DV: jax.Array,
    *,
    eps: float,
    multiprocessors: int,
    interpret: bool = False,
) -> jax.Array:
    """Normalises rows by their root mean square, multiplies by the head, and returns the ids of the
    greatest logits, int32 [M].

    Args:
      interpret: whether to interpret the kernels, on any machine.
    """
    M, V = x_MD.shape[0], head_DV.shape[1]
    width = columns_of_program([V], multiprocessors)
    n_blocks = V // width
    operands = x_MD, norm_D[None], head_DV[None]
    found = [jax.ShapeDtypeStruct((M, n_blocks), dtype) for dtype in (jnp.float32, jnp.int32)]
    best_MX, ids_MX = pl.pallas_call(
        functools.partial(_best_of_block, width=width, eps=eps),
        out_shape=found,
        grid=(n_blocks,),
        in_specs=[whole(each) for each in operands],
        out_specs=[whole(each) for each in found],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_STAGES),
        name="best_of_block",
        interpret=interpret,
    )(*operands)
    return pl.pallas_call(
        _best_of_row,
        out_shape=jax.ShapeDtypeStruct((M,), jnp.int32),
        grid=(M,),
        in_specs=[whole(each) for each in found],
        out_specs=pl.BlockSpec((M,), lambda m: (0,)),
        compiler_params=triton.CompilerParams(num_warps=4),
        name="best_of_row",
        interpret=interpret,
    )(best_MX, ids_MX)


def _best_of_block(x, norm, head, best_out, ids_out, *, width: int, eps: float) -> None:
    block = pl.program_id(0)
    logits_RF = product(x, head, norm, 0, block * width, width, eps)
    logits_RF = jnp.where(jnp.isnan(logits_RF), jnp.inf, logits_RF)
    best_R = logits_RF.max(axis=1)
    id_RF = block * width + lax.broadcasted_iota(jnp.int32, logits_RF.shape, 1)
    id_R = jnp.where(logits_RF == best_R[:, None], id_RF, head.shape[2]).min(axis=1)
    row_R = lax.broadcasted_iota(jnp.int32, (padded(x.shape[0]),), 0)
    for out, found_R in ((best_out, best_R), (ids_out, id_R)):
        triton.store(out.at[row_R, block], found_R, mask=row_R < x.shape[0])


def _best_of_row(best, ids, out) -> None:
    m, n_blocks = pl.program_id(0), best.shape[1]
    block_X = lax.broadcasted_iota(jnp.int32, (power_of_two(n_blocks),), 0)
    is_block_X = block_X < n_blocks
    best_X = triton.load(best.at[m, block_X], mask=is_block_X, other=-jnp.inf)
    id_X = triton.load(ids.at[m, block_X], mask=is_block_X, other=jnp.iinfo(jnp.int32).max)
    is_best_X = best_X == best_X.max(axis=0)
    out[m] = jnp.where(is_best_X, id_X, jnp.iinfo(jnp.int32).max).min(axis=0)
