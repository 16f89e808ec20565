"""What a decoding step does between MLA's projections and its attention to a cache of latents, for
Hopper GPUs, in one Triton kernel.

Queries without position are projected to queries of latents, the others are rotated; the new
token's latent is normed, its key rotated, and both are written to the cache in place. XLA starts
eight kernels for these.

The projection that all keys and values are made by is read in place from the stack of all layers,
of which each head has some columns: those of its keys, then those of its values. `head_values` is
the counterpart after attention.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsjax.kernels.few_rows import Norm, padded, whole

_CHANNELS = 64  # of latents, of a program
_VALUES = 32  # of a head, of a program
_DEPTH = 128


def fits(key_width: int, value_width: int, latent_width: int, rope_width: int) -> bool:
    """Returns whether the kernels take these widths: powers of two, in whole blocks."""
    widths = key_width, value_width, latent_width, rope_width
    return (
        all(width & (width - 1) == 0 and width >= 16 for width in widths)
        and value_width % _VALUES == 0
        and latent_width % _DEPTH == 0
    )


def latent_queries(
    q_MX: jax.Array,
    kv_MX: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    positions_M: jax.Array,
    wkv_b_LCX: jax.Array,
    norm: Norm,
    cached: tuple[jax.Array, jax.Array],
    layer: jax.Array,
    *,
    n_heads: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Makes queries, and writes each row's entries at its position.

    Args:
      q_MX: queries, [M, N * (H + R)].
      kv_MX: latents before their norm, and keys before their rotation, [M, C + R].
      angles: the pairs' cosine and sine, float32 [M, R / 2].
      positions_M: int32.
      wkv_b_LCX: [L, C, N * (H + W)].
      cached: the cache's stacks of latents [L, M, 1, S, C] and keys [L, M, 1, S, R].
      layer: int32 scalar.
      interpret: whether to interpret the kernel, on any machine.

    Returns:
      queries of latents [M, N, C] and rotated ones [M, N, R], in the queries' dtype, and the cache.
    """
    M, N = q_MX.shape[0], n_heads
    C, R = (each.shape[-1] for each in cached)
    operands = (
        layer[None], positions_M, q_MX, kv_MX, *angles, wkv_b_LCX, norm.weight_LD, *cached,
    )  # fmt: skip
    results = (
        jax.ShapeDtypeStruct((M, N, C), q_MX.dtype),
        jax.ShapeDtypeStruct((M, N, R), q_MX.dtype),
        *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in cached),
    )
    channels = min(_CHANNELS, C)
    return pl.pallas_call(
        functools.partial(_kernel, n_heads=N, channels=channels, eps=norm.eps),
        out_shape=results,
        # Of a head those that project, and the last one that rotates.
        grid=(N, C // channels + 1),
        in_specs=[whole(each) for each in operands],
        out_specs=[whole(each) for each in results],
        input_output_aliases={8: 2, 9: 3},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="latent_queries",
        interpret=interpret,
    )(*operands)


def _kernel(*arrays, n_heads: int, channels: int, eps: float):
    layer, positions, q, kv, cos, sin, wkv_b, norm = arrays[:8]
    q_latent, q_rope, latents, keys = arrays[-4:]  # the cache's are the same memory as before
    (M, N, C), R = q_latent.shape, q_rope.shape[2]
    H = q.shape[1] // N - R
    head, block = pl.program_id(0), pl.program_id(1)
    n_blocks = C // channels
    rows = padded(M)
    of_head = head * (H + R)

    @pl.when(block < n_blocks)
    def _():
        row_MH, column_MH = _indices((rows, H))
        q_MH = triton.load(q.at[row_MH, of_head + column_MH], mask=row_MH < M, other=0.0)
        columns = pl.ds(head * (wkv_b.shape[2] // N), H)
        w_CH = wkv_b[layer[0], pl.ds(block * channels, channels), columns]
        q_MC = lax.dot_general(
            q_MH, w_CH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        row_MC, column_MC = _indices((rows, channels))
        _store(q_latent, (row_MC, head, block * channels + column_MC), q_MC, row_MC < M)

    @pl.when(block == n_blocks)
    def _():
        row_MR, channel_MR = _indices((rows, R))
        rotated_MR = _rotated(q, cos, sin, row_MR, channel_MR, of_head + H, row_MR < M)
        _store(q_rope, (row_MR, head, channel_MR), rotated_MR, row_MR < M)

    @pl.when(block == n_blocks)
    def _():
        def write(turn, nothing):
            row = head + turn * n_heads
            place = positions[row]
            c_C = kv[row, pl.ds(0, C)].astype(jnp.float32)
            scale = lax.rsqrt((c_C * c_C).sum(axis=0) / C + eps)
            normed_C = c_C * scale * norm[layer[0], :].astype(jnp.float32)
            latents[layer[0], row, 0, place, :] = normed_C.astype(latents.dtype)
            channel_R = lax.broadcasted_iota(jnp.int32, (R,), 0)
            key_R = _rotated(kv, cos, sin, row, channel_R, C, None)
            keys[layer[0], row, 0, place, :] = key_R.astype(keys.dtype)
            return nothing

        # The heads share out the rows.
        lax.fori_loop(0, lax.div(M - head + n_heads - 1, n_heads), write, None)


def _rotated(x, cos, sin, row, channel, start, mask):
    """Reads channels from `start` on and rotates 2i and 2i + 1 as a pair, in float32."""
    other = None if mask is None else 0.0
    own, paired = (
        triton.load(x.at[row, start + each], mask=mask, other=other).astype(jnp.float32)
        for each in (channel, channel ^ 1)
    )
    pair = channel >> 1
    cosine, sine = (triton.load(each.at[row, pair], mask=mask, other=other) for each in (cos, sin))
    return own * cosine + jnp.where((channel & 1) == 0, -paired, paired) * sine


def head_values(
    out_MNC: jax.Array,
    wkv_b_LCX: jax.Array,
    layer: jax.Array,
    *,
    value_width: int,
    interpret: bool = False,
) -> jax.Array:
    """Projects latents that each head summed by weight to its values, [M, N * W].

    Args:
      wkv_b_LCX: [L, C, N * (H + W)].
      layer: int32 scalar.
      interpret: whether to interpret the kernel, on any machine.
    """
    M, N, _ = out_MNC.shape
    operands = layer[None], out_MNC, wkv_b_LCX
    result = jax.ShapeDtypeStruct((M, N * value_width), out_MNC.dtype)
    return pl.pallas_call(
        functools.partial(_values_kernel, value_width=value_width),
        out_shape=result,
        grid=(N, value_width // _VALUES),
        in_specs=[whole(each) for each in operands],
        out_specs=whole(result),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        name="head_values",
        interpret=interpret,
    )(*operands)


def _values_kernel(layer, latents, wkv_b, out, *, value_width: int):
    M, N, C = latents.shape
    head, block = pl.program_id(0), pl.program_id(1)
    per_head = wkv_b.shape[2] // N
    columns = pl.ds((head + 1) * per_head - value_width + block * _VALUES, _VALUES)
    rows = padded(M)

    def add(step, sum_MW):
        row_MC, channel_MC = _indices((rows, _DEPTH))
        index = row_MC, head, step * _DEPTH + channel_MC
        c_MC = triton.load(latents.at[index], mask=row_MC < M, other=0.0)
        w_CW = wkv_b[layer[0], pl.ds(step * _DEPTH, _DEPTH), columns]
        return sum_MW + jnp.dot(c_MC, w_CW, preferred_element_type=jnp.float32)

    sum_MW = lax.fori_loop(0, C // _DEPTH, add, jnp.zeros((rows, _VALUES), jnp.float32))
    row_MW, column_MW = _indices(sum_MW.shape)
    place = head * value_width + block * _VALUES + column_MW
    _store(out, (row_MW, place), sum_MW, row_MW < M)


def _indices(shape: tuple[int, int]) -> Any:
    return (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def _store(ref, index, value, mask):
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)
