"""Causal attention over whole sequences; query heads may share a key head.

`causal_attention` picks the kernel for the target. None of them holds a whole score matrix:

* TPU: the Mosaic kernel that ships with JAX (splash attention), which walks the causal square in
  tiles on the chip;
* Hopper GPUs: cuDNN's, for operands of two bytes without segments;
* other GPUs, and Hopper with segments or float32: the kernel that tokamax chooses, if installed;
* otherwise, and for lengths that a TPU's tiles do not divide: plain XLA
  (`dsjax.kernels.flash_attention`).

Keys may be wider than values in all of them, as MLA's are. `reference_attention` is the definition,
with the whole score matrix and autodiff.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.kernels import cudnn_attention
from dsjax.kernels.flash_attention import chunked_attention
from dsjax.kernels.target import Target, tokamax
from dsjax.kernels.varying import shipped_promotion

# Sides of a tile of the TPU's kernel: multiples of its 128 lanes. The backward pass writes one
# partial gradient of the queries per `_KEYS_AT_ONCE` keys.
_MIN_TILE, _MAX_TILE, _KEYS_AT_ONCE = 128, 512, 2048


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
    if target.kind == "tpu" and q_BTNH.shape[1] % _MIN_TILE == 0:
        return splash_attention(q_BTNH, k_BTPH, v_BTPW, scale, segment_ids_BT)
    if target.is_hopper and segment_ids_BT is None and cudnn_attention.takes(q_BTNH, v_BTPW):
        return cudnn_attention.cudnn_attention(q_BTNH, k_BTPH, v_BTPW, scale)
    if target.kind == "gpu" and tokamax():
        return tokamax_attention(q_BTNH, k_BTPH, v_BTPW, scale, segment_ids_BT)
    return chunked_attention(q_BTNH, k_BTPH, v_BTPW, scale, segment_ids_BT)


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
    """Runs `causal_attention` through the TPU's kernel; T must be a multiple of 128.

    Args:
      interpret: whether to interpret the kernel, on any machine.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q_BTNH.shape[1:3]
    tile = math.gcd(T, _MAX_TILE)
    mask = splash.CausalMask((T, T))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),  # pyright: ignore[reportAttributeAccessIssue]
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_q_dkv=tile,
            block_kv_dkv=math.gcd(T, _KEYS_AT_ONCE),
            block_kv_dkv_compute=tile,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )
    # The kernel does not scale its scores.
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    inputs = [x.swapaxes(1, 2) for x in (q_BTNH, k_BTPH, v_BTPW)]
    if segment_ids_BT is not None:
        inputs.append(segment_ids_BT)

    def of_row(q_NTH, k_PTH, v_PTW, segments_T=None):
        same = None if segments_T is None else splash.SegmentIds(segments_T, segments_T)
        return kernel(q_NTH, k_PTH, v_PTW, same)

    with shipped_promotion():
        out_BNTW: Any = jax.vmap(of_row)(*inputs)
    return out_BNTW.swapaxes(1, 2)
