"""Attention of one new token per row to a cache of latents, for Hopper GPUs, in Triton.

MLA's absorbed form: all heads share a latent and a rotated key per position, and the latent is the
value too, so a position is read once for 16 heads. A layer is read in place from the stack of all.
A row's positions are divided among several programs, since decoding has few rows (Flash-Decoding);
what they found is joined by their highest scores and totals, as blocks are in
`dsjax.kernels.cached_attention`.

Scores, softmax and sums are float32; weights are rounded to the cache's dtype for their product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsjax.kernels.cached_attention import Attended
from dsjax.kernels.target import Target
from dsjax.kernels.varying import by_hand

_BLOCK = 64  # positions
_HEADS = 16  # of a program; a matrix unit's rows
_PROGRAMS = 2  # per multiprocessor
_WIDEST = 512, 64  # latent and rotated key, which registers and shared memory hold
_MASKED = -1e30


def fits(
    q_BTNX: jax.Array | jax.ShapeDtypeStruct,
    latent_LB1SC: jax.Array,
    key_LB1SR: jax.Array,
    target: Target,
) -> bool:
    """Returns whether the kernel takes these operands here: one token per row, multiples of 16
    heads and of 64 cached positions, two-byte types, widths that are powers of two, and no mesh
    axis left to the compiler.
    """
    widths = latent_LB1SC.shape[-1], key_LB1SR.shape[-1]
    return (
        target.is_hopper
        and by_hand()
        and q_BTNX.shape[1] == 1
        and q_BTNX.shape[2] % _HEADS == 0
        and latent_LB1SC.dtype == key_LB1SR.dtype == q_BTNX.dtype
        and q_BTNX.dtype in (jnp.bfloat16, jnp.float16)
        and latent_LB1SC.shape[3] % _BLOCK == 0
        and all(
            w & (w - 1) == 0 and 16 <= w <= most for w, most in zip(widths, _WIDEST, strict=True)
        )
    )


def latent_attention(
    q_B1NC: jax.Array,
    q_B1NR: jax.Array,
    latent_LB1SC: jax.Array,
    key_LB1SR: jax.Array,
    layer: jax.Array,
    positions_B1: jax.Array,
    *,
    scale: float,
    multiprocessors: int,
    interpret: bool = False,
) -> Attended:
    """Attends to the cached positions of one layer up to each query's own.

    Args:
      q_B1NC: queries of latents.
      q_B1NR: their rotated channels.
      latent_LB1SC, key_LB1SR: the cache's stacks.
      layer: int32 scalar.
      positions_B1: int32.
      interpret: whether to interpret the kernel, on any machine.

    Returns:
      `out` in the queries' dtype, [B, 1, N, C].
    """
    B, _, N, C = q_B1NC.shape
    R, S = q_B1NR.shape[-1], latent_LB1SC.shape[3]
    n_groups = N // _HEADS
    n_splits = max(1, min(S // _BLOCK, _PROGRAMS * multiprocessors // (B * n_groups)))
    found_BNX = jax.ShapeDtypeStruct((B, N, n_splits), jnp.float32)
    sums = jax.ShapeDtypeStruct((B, N, n_splits, C), jnp.float32)
    out_BNXC, highest_BNX, total_BNX = pl.pallas_call(
        functools.partial(_kernel, scale=scale, n_splits=n_splits),
        out_shape=(sums, found_BNX, found_BNX),
        grid=(B, n_groups, n_splits),
        in_specs=[
            pl.BlockSpec((None, _HEADS, C), lambda b, n, x: (b, n, 0)),
            pl.BlockSpec((None, _HEADS, R), lambda b, n, x: (b, n, 0)),
            # Which of the blocks of positions a program reads depends on the row's own.
            pl.BlockSpec(latent_LB1SC.shape, lambda b, n, x: (0,) * 5),
            pl.BlockSpec(key_LB1SR.shape, lambda b, n, x: (0,) * 5),
            pl.BlockSpec((1,), lambda b, n, x: (0,)),
            pl.BlockSpec((1,), lambda b, n, x: (b,)),
        ],
        out_specs=[
            pl.BlockSpec((None, _HEADS, None, C), lambda b, n, x: (b, n, x, 0)),
            pl.BlockSpec((None, _HEADS, None), lambda b, n, x: (b, n, x)),
            pl.BlockSpec((None, _HEADS, None), lambda b, n, x: (b, n, x)),
        ],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        name="latent_attention",
        interpret=interpret,
    )(q_B1NC[:, 0], q_B1NR[:, 0], latent_LB1SC, key_LB1SR, layer[None], positions_B1[:, 0])
    highest_BN = highest_BNX.max(axis=-1)
    shares_BNX = total_BNX * jnp.exp(highest_BNX - highest_BN[..., None])
    total_BN = shares_BNX.sum(axis=-1)
    # Sums are not divided by their own totals yet.
    weights_BNX = jnp.exp(highest_BNX - highest_BN[..., None]) / total_BN[..., None]
    out_BNC = (out_BNXC * weights_BNX[..., None]).sum(axis=2).astype(q_B1NC.dtype)
    return Attended(out_BNC[:, None], highest_BN[:, None], total_BN[:, None])


def _kernel(
    q_latent, q_rope, latents, keys, layer, position, *results, scale: float, n_splits: int
):  # fmt: skip
    row, split = pl.program_id(0), pl.program_id(2)
    own = position[0]
    q_NC, q_NR = q_latent[...], q_rope[...]

    def attend(turn, found):
        highest_N, total_N, sums_NC = found
        places = pl.ds((split + turn * n_splits) * _BLOCK, _BLOCK)
        c_SC = latents[layer[0], row, 0, places, :]
        scores_NS = (_scores(q_NC, c_SC) + _scores(q_NR, keys[layer[0], row, 0, places, :])) * scale
        index_1S = lax.broadcasted_iota(jnp.int32, (1, _BLOCK), 1) + places.start
        scores_NS = jnp.where(index_1S <= own, scores_NS, _MASKED)
        new_N = jnp.maximum(highest_N, scores_NS.max(axis=1))
        weights_NS = jnp.exp(scores_NS - new_N[:, None])
        shrink_N = jnp.exp(highest_N - new_N)
        mixed_NC = jnp.dot(weights_NS.astype(c_SC.dtype), c_SC, preferred_element_type=jnp.float32)
        total_N = total_N * shrink_N + weights_NS.sum(axis=1)
        return new_N, total_N, sums_NC * shrink_N[:, None] + mixed_NC

    # Blocks split, split + n_splits, ... of those that the row can see: every one has a visible
    # position, so no program counts masked ones.
    n_blocks = own // _BLOCK + 1
    n_turns = lax.div(n_blocks - split + n_splits - 1, n_splits)
    start = (
        jnp.full((_HEADS,), _MASKED, jnp.float32),
        jnp.zeros((_HEADS,), jnp.float32),
        jnp.zeros(q_NC.shape, jnp.float32),
    )
    highest_N, total_N, sums_NC = lax.fori_loop(0, n_turns, attend, start)
    for result, found in zip(results, (sums_NC, highest_N, total_N), strict=True):
        result[...] = found


def _scores(q_NX, k_SX):
    return lax.dot_general(q_NX, k_SX, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
