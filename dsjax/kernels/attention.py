"""Causal attention over expanded keys and values; query heads may share a key head.

`causal_attention` is exact and never holds a score matrix: queries come in chunks, and a chunk
meets only the keys up to its own end, so half of the causal square is never computed. The backward
pass is written down (FlashAttention, arXiv:2205.14135, appendix B): it keeps one number a query and
computes a chunk's probabilities again. Scores and softmax are float32.

On a TPU it is the Mosaic kernel that ships with JAX (splash attention), which walks the square in
tiles on the chip; the chunks serve there for lengths that tiles do not divide. On a Hopper GPU it
is cuDNN's for whole sequences in two bytes an element; else, on a GPU, the kernel that tokamax
chooses, where tokamax is installed. Keys may be wider than values in both, as MLA's are.

`reference_attention` is the definition, with the whole score matrix and autodiff.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.kernels.target import Target, tokamax
from dsjax.kernels.varying import shipped_promotion

# Small chunks stay in cache and skip more of the square; their loop is unrolled, so they are few.
_MIN_CHUNK, _MAX_CHUNKS = 128, 16
_MASKED = -1e30
# Sides of a tile of the TPU's kernel: multiples of its 128 lanes. The backward pass makes a part of
# the queries' gradient for every `_KEYS_AT_ONCE` keys.
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
    if target.is_hopper and segment_ids_BT is None and _cudnn_takes(q_BTNH, v_BTPW):
        return cudnn_attention(q_BTNH, k_BTPH, v_BTPW, scale)
    if target.kind == "gpu" and tokamax():
        return tokamax_attention(q_BTNH, k_BTPH, v_BTPW, scale, segment_ids_BT)
    grouped = _group_heads(q_BTNH, k_BTPH, v_BTPW)
    return _ungroup_heads(_attention(*grouped, segment_ids_BT, scale))


def _cudnn_takes(q_BTNH: jax.Array, v_BTPW: jax.Array) -> bool:
    two_bytes = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    widths = q_BTNH.shape[-1], v_BTPW.shape[-1]
    return two_bytes and all(w % 8 == 0 and w <= 256 for w in widths)


def cudnn_attention(
    q_BTNH: jax.Array, k_BTPH: jax.Array, v_BTPW: jax.Array, scale: float
) -> jax.Array:
    """`causal_attention` of whole sequences through cuDNN's fused kernel, of a Hopper GPU.

    The function behind `jax.nn.dot_product_attention`, which itself wants values as wide as keys:
    filled up to that, MLA's attention takes 1.3 to 1.5 times as long on an H200.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with shipped_promotion():
        out_BTNW: Any = cudnn.dot_product_attention(
            q_BTNH, k_BTPH, v_BTPW, scale=scale, mask_type=cudnn.MaskType.CAUSAL
        )
    return out_BTNW


def tokamax_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    scale: float,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """`causal_attention` through the fastest of tokamax's kernels that takes these shapes here."""
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
    """`causal_attention` through the TPU's kernel; T must be a multiple of 128.

    Args:
      interpret: whether to run the kernel's steps on whatever machine this is.
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


def reference_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    *,
    scale: float,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """The same, with the whole score matrix at once."""
    q_BPGTH, k_BPTH, v_BPTW = _group_heads(q_BTNH, k_BTPH, v_BTPW)
    scores = _scores(q_BPGTH, k_BPTH, segment_ids_BT, 0, scale)
    out = jnp.einsum(
        "BPGTS,BPSW->BPGTW", jax.nn.softmax(scores, axis=-1).astype(v_BPTW.dtype), v_BPTW
    )
    return _ungroup_heads(out.astype(q_BTNH.dtype))


def _group_heads(q_BTNH, k_BTPH, v_BTPW):
    """Brings heads to the front, queries grouped by their key head: a batched product's layout."""
    B, T, N, H = q_BTNH.shape
    P = k_BTPH.shape[2]
    q_BPGTH = q_BTNH.reshape(B, T, P, N // P, H).transpose(0, 2, 3, 1, 4)
    return q_BPGTH, k_BTPH.swapaxes(1, 2), v_BTPW.swapaxes(1, 2)


def _ungroup_heads(out_BPGTW):
    B, P, G, T, W = out_BPGTW.shape
    return out_BPGTW.transpose(0, 3, 1, 2, 4).reshape(B, T, P * G, W)


def _scores(q_BPGTH, k_BPSH, segment_ids_BS, start: int, scale: float) -> jax.Array:
    """Masked float32 scores of queries at start, start + 1, ... against keys at 0 ... S - 1."""
    T, S = q_BPGTH.shape[3], k_BPSH.shape[2]
    scores = jnp.einsum("BPGTH,BPSH->BPGTS", q_BPGTH, k_BPSH, preferred_element_type=jnp.float32)
    visible = (jnp.arange(S)[None] <= jnp.arange(start, start + T)[:, None])[None, None, None]
    if segment_ids_BS is not None:
        same_BTS = segment_ids_BS[:, start : start + T, None] == segment_ids_BS[:, None, :S]
        visible = visible & same_BTS[:, None, None]
    return jnp.where(visible, scores * scale, _MASKED)


def _chunks(length: int) -> list[tuple[int, int]]:
    """(start, end) of each chunk of queries."""
    size = max(_MIN_CHUNK, -(-length // _MAX_CHUNKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, scale):
    return _attention_forward(q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, scale)[0]


def _attention_forward(q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, scale):
    outputs, log_sums = [], []
    for start, end in _chunks(q_BPGTH.shape[3]):
        scores = _scores(
            q_BPGTH[:, :, :, start:end], k_BPTH[:, :, :end], segment_ids_BT, start, scale
        )
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum(
            "BPGTS,BPSW->BPGTW",
            weights.astype(v_BPTW.dtype),
            v_BPTW[:, :, :end],
            preferred_element_type=jnp.float32,
        )
        outputs.append((out / total).astype(q_BPGTH.dtype))
        log_sums.append(highest + jnp.log(total))
    out_BPGTW, log_sum_BPGT1 = jnp.concatenate(outputs, axis=3), jnp.concatenate(log_sums, axis=3)
    return out_BPGTW, (q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, out_BPGTW, log_sum_BPGT1)


def _attention_backward(scale, residuals, dout_BPGTW):
    q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, out_BPGTW, log_sum_BPGT1 = residuals
    compute = q_BPGTH.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # sum over keys of probability times its gradient
    mean_BPGT1 = product("BPGTW,BPGTW->BPGT", dout_BPGTW, out_BPGTW)[..., None]
    dq = []
    dk_BPTH, dv_BPTW = (jnp.zeros(x.shape, jnp.float32) for x in (k_BPTH, v_BPTW))
    for start, end in _chunks(q_BPGTH.shape[3]):
        q, dout = q_BPGTH[:, :, :, start:end], dout_BPGTW[:, :, :, start:end]
        k, v = k_BPTH[:, :, :end], v_BPTW[:, :, :end]
        scores = _scores(q, k, segment_ids_BT, start, scale)
        probabilities = jnp.exp(scores - log_sum_BPGT1[:, :, :, start:end])
        dprobabilities = product("BPGTW,BPSW->BPGTS", dout, v)
        dscores = probabilities * (dprobabilities - mean_BPGT1[:, :, :, start:end]) * scale
        dscores, probabilities = dscores.astype(compute), probabilities.astype(compute)
        dq.append(product("BPGTS,BPSH->BPGTH", dscores, k).astype(compute))
        dk_BPTH = dk_BPTH.at[:, :, :end].add(product("BPGTS,BPGTH->BPSH", dscores, q))
        dv_BPTW = dv_BPTW.at[:, :, :end].add(product("BPGTS,BPGTW->BPSW", probabilities, dout))
    return (
        jnp.concatenate(dq, axis=3),
        dk_BPTH.astype(k_BPTH.dtype),
        dv_BPTW.astype(v_BPTW.dtype),
        None,
    )


_attention.defvjp(_attention_forward, _attention_backward)
