"""The products of linear layers, and the one place that chooses their operands' types.

A linear layer has three products: forward, input gradient and weight gradient. Autodiff would run
the latter two in whatever types the forward casts leave behind, so each is written out: operands in
the policy's compute type, accumulation in float32, activations in the compute type, weight
gradients in float32.

With `policy.fp8` the operands are block-scaled E4M3 instead (`dsjax.precision.fp8` says why in
these blocks), quantised from the activation itself and from the float32 master weight:

| product         | operands                  | blocks             |
|-----------------|---------------------------|--------------------|
| forward         | x, w                      | 1 x 128, 128 x 128 |
| input gradient  | dy, w                     | 1 x 128, 128 x 128 |
| weight gradient | x^T, dy (K runs over rows)| 128 x 1, 128 x 1   |

There are two ways to multiply them:

* Native, where matrix units take E4M3 (`policy.native_fp8`): `dsjax.kernels.fp8_gemm` multiplies
  the E4M3 numbers themselves, one product per 128 elements of K, whose sums are converted to
  float32 and scaled. Within 1e-5 of the definition (`scaled_matmul` with float32 sums) where the
  unit adds in float32; the 14 bits of a Hopper unit should cost 0.1 %, by our model of it. On a
  Hopper, where no mesh axis is left to the compiler, `dsjax.kernels.hopper_scaled` does the same
  with float32 sums that stay in registers, and `dsjax.precision.hopper_quantize` quantises.
* Emulated, elsewhere: the numbers times their scales, in a type that the machine multiplies anyway,
  accumulated in float32. With power-of-two scales bfloat16 and float32 both hold such an operand
  exactly (4 significant bits), the product of two is exact in float32, and only the order of
  summation differs from the definition. Float32 scales need float32 operands, each rounded once to
  24 bits; `jax_default_matmul_precision` says how a GPU or TPU multiplies those.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.kernels import hopper_scaled
from dsjax.kernels.fp8_gemm import (
    e4m3_product,
    scaled_grouped_matmul,
    scaled_grouped_outer,
    scaled_matmul,
)
from dsjax.kernels.grouped_matmul import (
    align_groups,
    aligned_sizes,
    grouped_matmul,
    grouped_outer,
)
from dsjax.kernels.varying import by_hand, call_shipped
from dsjax.precision import hopper_quantize, small_weights
from dsjax.precision.bands import matmul_in_bands
from dsjax.precision.float_bits import FloatBits
from dsjax.precision.fp8 import (
    CHANNEL_TILE,
    TOKEN_TILE,
    WEIGHT_BLOCK,
    BlockScaled,
    quantize_block,
    round_trip,
)
from dsjax.precision.policy import Policy
from dsjax.precision.small_weights import Weight

# Block of the activation gradient in the input gradient. `docs/fp8_training.py` shows the effect of
# larger blocks.
GRADIENT_TILE = CHANNEL_TILE
_PARTS = 16  # of a sum, where a GPU multiplies a single row


def _operand(
    x: jax.Array, block: tuple[int, int], policy: Policy, turned: bool = False
) -> jax.Array | BlockScaled:
    """Casts or quantises an operand as the policy says.

    Args:
      turned: whether a product will read this weight along its rows.
    """
    if policy.fp8 is None:
        return x.astype(policy.compute)
    if policy.native_fp8:
        return quantized(x, block, policy, turned)
    # A CPU without bfloat16 instructions multiplies float32 two to three times faster.
    exact = jnp.bfloat16 if policy.fp8 == "pow2" and policy.target.kind != "cpu" else jnp.float32
    return round_trip(x, block, policy.fp8, exact)


def quantized(
    x: jax.Array, block: tuple[int, int], policy: Policy, turned: bool = False
) -> BlockScaled:
    """Returns `quantize_block(x, block, policy.fp8)`, on a Hopper by its own kernels.

    Args:
      turned: whether a weight's numbers shall lie in memory with columns as rows.
    """
    assert policy.fp8
    by_kernels = block in (CHANNEL_TILE, WEIGHT_BLOCK) or (block == TOKEN_TILE and x.ndim == 2)
    if not (by_kernels and _has_kernels(policy, x)):
        return quantize_block(x, block, policy.fp8)
    if block == WEIGHT_BLOCK:
        quantize = functools.partial(
            hopper_quantize.quantize_weights, turned=turned, scale=policy.fp8
        )
        found, own = call_shipped(quantize, x.reshape(-1, *x.shape[-2:])), 2
    else:
        (found,) = _quantized_rows(policy, (block,), x.reshape(-1, x.shape[-1]))
        own = 1 if block == CHANNEL_TILE else 2
    leading = x.shape[:-own]
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[-own:]), found)


def _quantized_rows(
    policy: Policy, blocks: tuple[tuple[int, int], ...], x_AD: jax.Array, *sizes_E: jax.Array
) -> tuple[BlockScaled, ...]:
    assert policy.fp8
    quantize = functools.partial(hopper_quantize.quantize_rows, blocks=blocks, scale=policy.fp8)
    return call_shipped(quantize, x_AD, *sizes_E)


def _matmul(x, y, dtype: DTypeLike, policy: Policy) -> jax.Array:
    """Multiplies operands x[..., K] and y[K, N], accumulating in float32; returns `dtype`."""
    if isinstance(x, BlockScaled):
        return _native_matmul(x, y, dtype, policy)
    wide = jnp.float32 if x.dtype == jnp.float32 else dtype
    return jnp.matmul(x, y, preferred_element_type=wide).astype(dtype)


def _native_matmul(x: BlockScaled, y: BlockScaled, dtype: DTypeLike, policy: Policy) -> jax.Array:
    rows, row_scales = (a.reshape(-1, a.shape[-1]) for a in (x.values, x.scales))
    scales_XN = _column_scales(y)
    if _has_kernels(policy, x, y):
        multiply = functools.partial(hopper_scaled.matmul, dtype=dtype)
        out_MN = call_shipped(multiply, rows, row_scales, y.values.mT, scales_XN.mT)
    else:
        out_MN = scaled_matmul(rows, row_scales, y.values, scales_XN, product=e4m3_product)
    return out_MN.reshape(*x.values.shape[:-1], -1).astype(dtype)


def _column_scales(y: BlockScaled) -> jax.Array:
    """Returns the scales of y[..., K, N] for each column: [..., ceil(K / 128), N]."""
    return jnp.repeat(y.scales, y.block[1], axis=-1)[..., : y.shape[-1]]


def _has_kernels(policy: Policy, *operands: jax.Array | BlockScaled) -> bool:
    """Whether there are kernels here that quantise, and that keep a slice's sums in registers."""
    # Pallas counts an array's elements in 32 bits up to 2^32 bytes.
    small = all(math.prod(x.shape) < 2**31 for x in operands)
    return policy.target.is_hopper and by_hand() and small


def _one_row(x: jax.Array, w_DF: jax.Array, policy: Policy) -> jax.Array:
    """Multiplies the only row of x[..., D] by w[D, F], in float32.

    XLA's GPU compiler has no matrix product of one row: it writes the products of all elements to
    memory, in the operands' type, and sums those. Here it reads the matrix once, in place even from
    a stack of layers, in parts whose sums are added afterwards: columns alone would keep few
    multiprocessors busy.
    """
    P = math.gcd(_PARTS, w_DF.shape[0])
    # Without these barriers it fuses what comes before and after, and is back at its own way.
    x = jax.lax.optimization_barrier(x.astype(policy.compute))
    w_PXF = w_DF.astype(policy.compute).reshape(P, -1, w_DF.shape[1])
    products_PXF = x.reshape(P, -1, 1).astype(jnp.float32) * w_PXF.astype(jnp.float32)
    sums_PF = jax.lax.optimization_barrier(products_PXF.sum(axis=1))
    return sums_PF.sum(axis=0).reshape(*x.shape[:-1], -1)


def linear_forward(x: jax.Array, w_DF: Weight, policy: Policy) -> jax.Array:
    """Multiplies x[..., D] by the float32 master w[D, F]: [..., F] in the compute type.

    In inference the weight may be of the compute type, or small.
    """
    if isinstance(w_DF, BlockScaled):
        return small_weights.matmul(x, w_DF, policy, policy.compute)
    if isinstance(w_DF, FloatBits):
        if policy.fp8 is None:
            return matmul_in_bands(x, w_DF, policy.compute).astype(policy.compute)
        w_DF = w_DF.astype(jnp.float32)
    if policy.target.is_hopper and not policy.fp8 and x.size == x.shape[-1] and by_hand():
        return _one_row(x, w_DF, policy).astype(policy.compute)
    weight = _operand(w_DF, WEIGHT_BLOCK, policy, turned=True)
    return _matmul(_operand(x, CHANNEL_TILE, policy), weight, policy.compute, policy)


def linear_backward(policy: Policy, residuals, dy):
    x, w_DF = residuals
    weight = _operand(w_DF, WEIGHT_BLOCK, policy)
    x_MD, dy_MF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if _quantises_gradients_at_once(policy, dy):
        dy, dy_MF = _quantized_rows(policy, (CHANNEL_TILE, TOKEN_TILE), dy_MF)
    else:
        dy, dy_MF = _operand(dy, GRADIENT_TILE, policy), _operand(dy_MF, TOKEN_TILE, policy)
    dx = _matmul(dy, weight.mT, policy.compute, policy).reshape(x.shape)
    dw_DF = _matmul(_operand(x_MD, TOKEN_TILE, policy).mT, dy_MF, jnp.float32, policy)
    return dx.astype(x.dtype), dw_DF.astype(w_DF.dtype)


def _quantises_gradients_at_once(policy: Policy, *rows: jax.Array) -> bool:
    """Whether kernels here quantise all of these, a gradient for both of its products at once."""
    native = policy.fp8 is not None and bool(policy.native_fp8)
    return native and GRADIENT_TILE == CHANNEL_TILE and _has_kernels(policy, *rows)


linear = jax.custom_vjp(linear_forward, nondiff_argnums=(2,))
linear.defvjp(lambda x, w, policy: (linear_forward(x, w, policy), (x, w)), linear_backward)


def grouped_forward(
    x_AD: jax.Array, w_EDF: Weight, sizes_E: jax.Array, policy: Policy
) -> jax.Array:
    """Does what `linear` does for rows sorted by expert: [A, D], weights [E, D, F] -> [A, F]."""
    if isinstance(w_EDF, BlockScaled):
        return small_weights.grouped_matmul(x_AD, w_EDF, sizes_E, policy)
    w_EDF = w_EDF.astype(jnp.float32) if isinstance(w_EDF, FloatBits) else w_EDF
    w = _operand(w_EDF, WEIGHT_BLOCK, policy, turned=True)
    return _grouped_matmul(_operand(x_AD, CHANNEL_TILE, policy), w, sizes_E, policy)


def grouped_backward(policy: Policy, residuals, dy_AF):
    x_AD, w_EDF, sizes_E = residuals
    w = _operand(w_EDF, WEIGHT_BLOCK, policy)
    # The rows of a token tile share a scale, so they must belong to one expert.
    if _quantises_gradients_at_once(policy, dy_AF, x_AD):
        dy, dy_by_tokens = _quantized_rows(policy, (CHANNEL_TILE, TOKEN_TILE), dy_AF, sizes_E)
        (x,) = _quantized_rows(policy, (TOKEN_TILE,), x_AD, sizes_E)
        sizes = aligned_sizes(sizes_E, TOKEN_TILE[0])
    else:
        dy, x, dy_by_tokens, sizes = _operand(dy_AF, GRADIENT_TILE, policy), x_AD, dy_AF, sizes_E
        if policy.fp8:
            (x, dy_by_tokens), sizes = align_groups((x_AD, dy_AF), sizes_E, TOKEN_TILE[0])
        x, dy_by_tokens = (_operand(rows, TOKEN_TILE, policy) for rows in (x, dy_by_tokens))
    dx_AD = _grouped_matmul(dy, w, sizes_E, policy, transpose_w=True)
    dw_EDF = _grouped_outer(x, dy_by_tokens, sizes, policy)
    return dx_AD.astype(x_AD.dtype), dw_EDF.astype(w_EDF.dtype), None


def _grouped_matmul(x, w, sizes_E: jax.Array, policy: Policy, transpose_w: bool = False):
    """Multiplies [A, D] by [E, D, F] ([E, F, D] with `transpose_w`): [A, F], compute type."""
    if isinstance(x, BlockScaled):
        w = w.mT if transpose_w else w
        if _has_kernels(policy, x, w):
            multiply = functools.partial(hopper_scaled.grouped_matmul, dtype=policy.compute)
            columns = w.values.mT, _column_scales(w).mT
            return call_shipped(multiply, x.values, x.scales, *columns, sizes_E)
        out_AF = scaled_grouped_matmul(x.values, x.scales, w.values, w.scales, sizes_E)
        return out_AF.astype(policy.compute)
    return grouped_matmul(
        x, w, sizes_E, policy.target, transpose_w=transpose_w, dtype=policy.compute
    )


def _grouped_outer(x, dy, sizes_E: jax.Array, policy: Policy) -> jax.Array:
    if isinstance(x, BlockScaled):
        if _has_kernels(policy, x, dy):
            operands = (a.mT for a in (x.values, x.scales, dy.values, dy.scales))
            return call_shipped(hopper_scaled.grouped_outer, *operands, sizes_E)
        return scaled_grouped_outer(x.values, x.scales, dy.values, dy.scales, sizes_E)
    return grouped_outer(x, dy, sizes_E, policy.target)


grouped_linear = jax.custom_vjp(grouped_forward, nondiff_argnums=(3,))
grouped_linear.defvjp(
    lambda x, w, sizes, policy: (grouped_forward(x, w, sizes, policy), (x, w, sizes)),
    grouped_backward,
)


def float32_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies in true float32 on every machine, as the router needs: a TPU would otherwise round
    the operands to bfloat16.
    """
    return jnp.matmul(
        x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def vocabulary_logits(x: jax.Array, w_DV: Weight, policy: Policy) -> jax.Array:
    """Returns the head's logits, float32 [..., V], from operands in the compute type."""
    if isinstance(w_DV, BlockScaled):
        return small_weights.matmul(x, w_DV, policy, jnp.float32)
    if isinstance(w_DV, FloatBits):
        return matmul_in_bands(x, w_DV, policy.compute)
    compute = policy.compute
    return jnp.matmul(x.astype(compute), w_DV.astype(compute), preferred_element_type=jnp.float32)
