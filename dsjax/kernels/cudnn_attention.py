"""cuDNN's fused attention for Hopper GPUs: causal, over whole sequences, in two-byte types.

XLA's GPU compiler turns custom calls of two names into cuDNN's flash attention. JAX reaches them
through `jax.nn.dot_product_attention`, which insists on values as wide as keys: padded to that,
MLA's attention takes 1.3 to 1.5 times as long on an H200. So the calls are made here, through
`jax.ffi` and with the settings that JAX gives them.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

# Output and gradients arrive as [B, N, T, X], stored as [B, T, N, X].
_STORED = (0, 2, 1, 3)
# Contracted and batch dims of a product's two operands; probabilities are [B, N, T, S].
_DIMS = ("lhs_contracting", "rhs_contracting", "lhs_batch", "rhs_batch")
_QUERY_KEY = ("3", "3", "02", "02")
_PROBABILITY_VALUE = ("3", "1", "01", "02")
_TRANSPOSED_PROBABILITY_QUERY = ("2", "1", "01", "02")
FORWARD = {"bmm1": _QUERY_KEY, "bmm2": _PROBABILITY_VALUE}
BACKWARD = {
    "bmm1_grad_gemm1": _TRANSPOSED_PROBABILITY_QUERY,  # dk
    "bmm1_grad_gemm2": _PROBABILITY_VALUE,  # dq
    "bmm2_grad_gemm1": _TRANSPOSED_PROBABILITY_QUERY,  # dv
    "bmm2_grad_gemm2": _QUERY_KEY,  # gradient of the probabilities
}


def takes(q_BTNH: jax.Array, v_BTPW: jax.Array) -> bool:
    """Whether the kernel takes operands of these types and widths."""
    two_bytes = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    widths = q_BTNH.shape[-1], v_BTPW.shape[-1]
    return two_bytes and all(width % 8 == 0 and width <= 256 for width in widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cudnn_attention(
    q_BTNH: jax.Array, k_BTPH: jax.Array, v_BTPW: jax.Array, scale: float
) -> jax.Array:
    """Attends causally; each of P key heads serves N / P consecutive query heads: [B, T, N, W]."""
    return _forward(q_BTNH, k_BTPH, v_BTPW, scale)[0]


def _forward(q_BTNH, k_BTPH, v_BTPW, scale):
    B, T, N, _ = q_BTNH.shape
    call = _call("__cudnn$fmhaSoftmax", q_BTNH, k_BTPH, scale, FORWARD)
    out = jax.ShapeDtypeStruct((B, T, N, v_BTPW.shape[-1]), q_BTNH.dtype)
    log_sums = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    out_BTNW, log_sums_BNT = call((q_BTNH, k_BTPH, v_BTPW), (out,), (log_sums,))
    return out_BTNW, (q_BTNH, k_BTPH, v_BTPW, log_sums_BNT, out_BTNW)


def _backward(scale, residuals, dout_BTNW):
    *inputs, log_sums_BNT, out_BTNW = residuals
    call = _call("__cudnn$fmhaSoftmaxBackward", *inputs[:2], scale, BACKWARD)  # type: ignore
    return call((*inputs, log_sums_BNT, dout_BTNW, out_BTNW), inputs)


cudnn_attention.defvjp(_forward, _backward)


def _call(name: str, q_BTNH: jax.Array, k_BTPH: jax.Array, scale: float, products: dict[str, Any]):
    """Returns cuDNN's kernel as a function of its operands, of the shapes [B, T, N, X] of results
    and of the shapes of others.
    """
    B, T, N, _ = q_BTNH.shape
    attention: dict[str, Any] = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": scale,
        "intermediate_tensor_shape": {
            "element_type": {"bfloat16": "BF16", "float16": "F16"}[q_BTNH.dtype.name],
            "dimensions": [str(size) for size in (B, N, T, k_BTPH.shape[1])],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "CAUSAL",
        "max_seg_per_batch": 1,
    }
    for product, dims in products.items():
        attention[f"{product}_dot_dimension_numbers"] = {
            f"{kind}_dimensions": list(digits) for kind, digits in zip(_DIMS, dims, strict=True)
        }
    config = {"operation_queue_id": "0", "cudnn_fmha_backend_config": attention}

    def call(operands, results, others=()):
        stored = [jax.ShapeDtypeStruct([x.shape[dim] for dim in _STORED], x.dtype) for x in results]
        workspace = jax.ShapeDtypeStruct((0,), jnp.uint8)  # the compiler gives it a size
        found: Any = jax.ffi.ffi_call(
            name,
            (*stored, *others, workspace),
            output_layouts=[_STORED] * len(stored) + [None] * (len(others) + 1),
            custom_call_api_version=2,
            legacy_backend_config=json.dumps(config),
        )(*operands)
        return *(x.swapaxes(1, 2) for x in found[: len(stored)]), *found[len(stored) : -1]

    return call
