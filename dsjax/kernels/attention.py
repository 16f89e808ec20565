"""Attention over whole sequences: causal, where query heads may share a key head, and of all places
of a picture to all (`full_attention`).

`causal_attention` picks the kernel for the target. None of them holds a whole score matrix:

* TPU: the Mosaic kernel that ships with JAX (splash attention), which walks the causal square in
  tiles on the chip;
* Hopper GPUs: cuDNN's, for operands of two bytes without segments; with segments Triton kernels
  (`dsjax.kernels.hopper_attention`), for lengths that their tiles divide;
* other GPUs, and other operands on Hopper: the kernel that tokamax chooses, if installed;
* otherwise, and for short rows that a TPU's tiles do not divide: plain XLA
  (`dsjax.kernels.flash_attention`).

Keys may be wider than values in all of them, as MLA's are. The definition, with the whole score
matrix and autodiff, is `reference_attention` in `tests/oracles/kernels.py`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.kernels import cudnn_attention, hopper_attention
from dsjax.kernels.flash_attention import chunked_attention
from dsjax.kernels.target import Target, tokamax
from dsjax.kernels.varying import shipped_promotion

# Sides of a tile of the TPU's kernel: multiples of its 128 lanes. The backward pass writes one
# partial gradient of the queries per `_KEYS_AT_ONCE` keys.
_MIN_TILE, _MAX_TILE, _KEYS_AT_ONCE = 128, 512, 2048

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def causal_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    *,
    scale: float,
    target: Target,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """Attends causally; each of P key heads serves N / P consecutive query heads.

    Args:
      segment_ids_BT: int32; a query only sees keys of its own segment. None: all earlier ones.

    Returns:
      [B, T, N, W] in q's dtype.
    """
    T = q_BTNH.shape[1]
    if target.kind == "tpu" and (T % _MIN_TILE == 0 or T > _MAX_TILE):
        return splash_attention(q_BTNH, k_BTPH, v_BTPW, scale, segment_ids_BT)
    if target.is_hopper and segment_ids_BT is None and cudnn_attention.takes(q_BTNH, v_BTPW):
        return cudnn_attention.cudnn_attention(q_BTNH, k_BTPH, v_BTPW, scale)
    if segment_ids_BT is not None and hopper_attention.fits(q_BTNH, v_BTPW, target):
        return hopper_attention.document_attention(q_BTNH, k_BTPH, v_BTPW, segment_ids_BT, scale)
    if target.kind == "gpu" and tokamax():
        return tokamax_attention(q_BTNH, k_BTPH, v_BTPW, scale, segment_ids_BT)
    return chunked_attention(q_BTNH, k_BTPH, v_BTPW, scale, segment_ids_BT)


@jax.custom_vjp
def full_attention(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array) -> jax.Array:
    """Attends from every query to every key; scores are divided by the root of H.

    Scores and softmax are float32. The backward pass is written down so that its products, too,
    have operands of the inputs' type: autodiff would multiply float32 by bfloat16.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    return _full_forward(q_BTNH, k_BSNH, v_BSNH)[0]


def _full_forward(q_BTNH, k_BSNH, v_BSNH):
    scores_BNTS = _product("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * q_BTNH.shape[-1] ** -0.5
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    out = _product("BNTS,BSNH->BTNH", weights_BNTS.astype(v_BSNH.dtype), v_BSNH)
    return out.astype(q_BTNH.dtype), (q_BTNH, k_BSNH, v_BSNH, weights_BNTS)


def _full_backward(residuals, dout_BTNH):
    q_BTNH, k_BSNH, v_BSNH, weights = residuals
    dweights = _product("BTNH,BSNH->BNTS", dout_BTNH, v_BSNH)
    mean = (weights * dweights).sum(axis=-1, keepdims=True)
    dscores = (weights * (dweights - mean) * q_BTNH.shape[-1] ** -0.5).astype(q_BTNH.dtype)
    gradients = (
        _product("BNTS,BSNH->BTNH", dscores, k_BSNH),
        _product("BNTS,BTNH->BSNH", dscores, q_BTNH),
        _product("BNTS,BTNH->BSNH", weights.astype(v_BSNH.dtype), dout_BTNH),
    )
    return tuple(dx.astype(q_BTNH.dtype) for dx in gradients)


full_attention.defvjp(_full_forward, _full_backward)


def tokamax_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    scale: float,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """Runs `causal_attention` through the fastest of tokamax's kernels for these shapes."""
    same_B1TT = None
    if segment_ids_BT is not None:
        same_B1TT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    with shipped_promotion():
        return tokamax().dot_product_attention(
            q_BTNH, k_BTPH, v_BTPW, mask=same_B1TT, scale=scale, is_causal=True
        )


def splash_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    scale: float,
    segment_ids_BT: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Runs `causal_attention` through the TPU's kernel. Rows that tiles do not divide are filled up
    with tokens at their end, which none of the others sees.

    Args:
      interpret: whether to interpret the kernel, on any machine.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q_BTNH.shape[1:3]
    filled = T + (-T % _MAX_TILE if T % _MIN_TILE else 0)

    def fill(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, filled - T)] + [(0, 0)] * (x.ndim - 2))

    tile = math.gcd(filled, _MAX_TILE)
    mask = splash.CausalMask((filled, filled))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),  # pyright: ignore[reportAttributeAccessIssue]
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_q_dkv=tile,
            block_kv_dkv=math.gcd(filled, _KEYS_AT_ONCE),
            block_kv_dkv_compute=tile,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )
    # The kernel does not scale its scores.
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    inputs = [fill(x).swapaxes(1, 2) for x in (q_BTNH, k_BTPH, v_BTPW)]
    if segment_ids_BT is not None:
        inputs.append(fill(segment_ids_BT))

    def of_row(q_NTH, k_PTH, v_PTW, segments_T=None):
        same = None if segments_T is None else splash.SegmentIds(segments_T, segments_T)
        return kernel(q_NTH, k_PTH, v_PTW, same)

    with shipped_promotion():
        out_BNTW: Any = jax.vmap(of_row)(*inputs)
    return out_BNTW[:, :, :T].swapaxes(1, 2)
