"""Attention in three branches, of which a query reads few keys (native sparse attention), in XLA.

* Compressed: one key and value for every `length` tokens, which begin every `stride` tokens. A
  query sees those whose last token is not after it. Their probabilities also say which blocks
  matter.
* Selected: `blocks` blocks of `size` tokens, among them the first one and the two that a query is
  in or just after. The query heads that share a key head share a choice.
* Window: the last `window` tokens.

A query's own document begins at `first`, and blocks are counted from there, so nothing crosses the
border of a packed document, and a document has the blocks that it has alone. Choice and attention
are separate, as in `dsjax.kernels.sparse_attention`: `select` turns scores into block numbers, and
into which of them are valid. `masked_attention` scores all keys and masks those outside a query's
blocks: the definition. `gathered_attention` reads the chosen blocks only, and so does
`table_attention` by a kernel for TPUs. A query that sees no key gets 0.

The choice has no gradient. Paper: NSA (arXiv:2502.11089), section 3. Equation 9 is printed as
p[4j - m - n], where its blocks and entries count from 1; counted from 0, as in equations 7 and 11,
the entries inside block j are 4j + m - n.

Letters besides the package's: Z compressed entries, J blocks of a document, X chosen blocks, U
tokens of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.kernels import block_kernel, sparse_attention, stacked_rows
from dsjax.kernels.query_tiles import over_tiles
from dsjax.kernels.sparse_attention import Selection
from dsjax.kernels.target import Target

# Most numbers in the largest array of one tile of queries: 64 MiB of float32.
_MOST = 2**24
# Sequences of up to this many times the chosen keys are masked, longer ones gathered: a product
# reads a key once for many queries, a gather once for each.
_DENSE = 8
_MASKED = -1e30

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Pattern(NamedTuple):
    """Sizes, in tokens unless said otherwise."""

    length: int  # of what is compressed to one entry
    stride: int  # between the beginnings of entries
    size: int  # of a block that is selected
    blocks: int  # per query
    window: int


class Stack(NamedTuple):
    """Keys or values of one layer, in a stack that stays whole so that nothing is copied."""

    stack_LBPSX: jax.Array
    layer: jax.Array | int

    @property
    def length(self) -> int:
        return self.stack_LBPSX.shape[3]

    def whole(self) -> jax.Array:
        """Returns [B, P, S, X]."""
        return lax.dynamic_index_in_dim(self.stack_LBPSX, self.layer, keepdims=False)

    def take(self, places_BPX: jax.Array) -> jax.Array:
        """Returns [B, P, ..., X] at int32 places [B, P, ...], all within the stack."""
        return stacked_rows.take(self.stack_LBPSX, self.layer, places_BPX)


class Branch(NamedTuple):
    """What one branch attends to."""

    key: Stack
    value: Stack


class Queries(NamedTuple):
    q_BTNH: jax.Array
    places_BT: jax.Array  # int32, place of each query in its row; consecutive within a tile
    first_BT: jax.Array  # int32, place at which its document begins
    gates_BTN3: jax.Array  # float32, of the three branches


def attend(
    queries: Queries,
    compressed: Branch,
    begins_BZ: jax.Array,
    selected: Branch,
    windowed: Branch,
    *,
    pattern: Pattern,
    scale: float,
    target: Target,
    part: int | None = None,
    aligned: bool = False,
) -> jax.Array:
    """Sums the three branches by their gates: [B, T, N, W].

    Args:
      begins_BZ: int32, place of the first token of each compressed entry; negative: no entry.
      part: queries are consecutive within parts of this many; None: all are.
      aligned: whether all documents begin at multiples of a block.
    """
    B, T, N, _ = queries.q_BTNH.shape
    S = selected.key.length
    chosen = pattern.blocks * pattern.size
    gathered = T == 1 or S > _DENSE * chosen
    attention: Any = gathered_attention if gathered else masked_attention
    if gathered and aligned and block_kernel.takes(target, pattern.size, S):
        attention = table_attention
    tile = functools.partial(
        _tile,
        branches=(compressed, selected, windowed),
        begins_BZ=begins_BZ,
        pattern=pattern,
        scale=scale,
        attention=attention,
    )
    _, _, P, _, H = selected.key.stack_LBPSX.shape
    keys = P * min(chosen, S) * H if gathered else N * S
    most = max(_MOST // (B * max(keys, N * compressed.key.length)), 1)
    return over_tiles(tile, queries, most=most, parts=T // part if part else 1)


def _tile(
    queries: Queries,
    *,
    branches: tuple[Branch, Branch, Branch],
    begins_BZ: jax.Array,
    pattern: Pattern,
    scale: float,
    attention: Callable[[Queries, Branch, Selection, int, float], jax.Array],
) -> jax.Array:
    compressed, selected, windowed = branches
    seen_BTZ = visible_entries(queries, begins_BZ, pattern)
    cmp_BTNW, probabilities_BTPZ = compressed_attention(queries.q_BTNH, compressed, seen_BTZ, scale)
    n_blocks = -(-selected.key.length // pattern.size)
    scores_BTPJ = importance(
        lax.stop_gradient(probabilities_BTPZ), queries.first_BT, pattern, n_blocks
    )
    selection = select(scores_BTPJ, queries, pattern)
    slc_BTNW = attention(queries, selected, selection, pattern.size, scale)
    win_BTNW = window_attention(queries, windowed, window=pattern.window, scale=scale)
    outs_BTNW3 = jnp.stack([cmp_BTNW, slc_BTNW, win_BTNW], axis=-1)
    mixed_BTNW = (outs_BTNW3 * queries.gates_BTN3[:, :, :, None]).sum(axis=-1)
    return mixed_BTNW.astype(queries.q_BTNH.dtype)


def visible_entries(queries: Queries, begins_BZ: jax.Array, pattern: Pattern) -> jax.Array:
    """Tells which entries are of a query's document and complete at its place: bool [B, T, Z]."""
    begins_B1Z = begins_BZ[:, None]
    complete_BTZ = begins_B1Z + pattern.length - 1 <= queries.places_BT[:, :, None]
    own_BTZ = begins_B1Z >= queries.first_BT[:, :, None]
    return complete_BTZ & own_BTZ & (begins_B1Z >= 0)


def compressed_attention(
    q_BTNH: jax.Array, branch: Branch, seen_BTZ: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attends to the compressed entries that each query sees.

    Returns:
      float32 [B, T, N, W]; and the probability of each entry, summed over the query heads that
      share a key head, float32 [B, T, P, Z].
    """
    k_BPZH = branch.key.whole()
    scores_BTPGZ = _product("BTPGH,BPZH->BTPGZ", _grouped(q_BTNH, k_BPZH.shape[1]), k_BPZH) * scale
    weights_BTPGZ = _softmax(scores_BTPGZ, seen_BTZ[:, :, None, None])
    return _mix(weights_BTPGZ, branch.value.whole()), weights_BTPGZ.sum(axis=3)


def importance(
    probabilities_BTPZ: jax.Array, first_BT: jax.Array, pattern: Pattern, n_blocks: int
) -> jax.Array:
    """Returns the weight of each block of a query's document, float32 [B, T, P, J]: the sum of
    p[r j + m - n] for m < r, n < q, where r blocks of a stride make a selected one and q make a
    compressed one (equations 9 and 10).
    """
    r, q = pattern.size // pattern.stride, pattern.length // pattern.stride
    # Entry i of a document that begins at `first` is entry first // stride + i of its row.
    shift_BT = first_BT // pattern.stride
    needed = n_blocks * r
    place_BTI = shift_BT[:, :, None] + _numbers(needed, 3)
    Z = probabilities_BTPZ.shape[-1]
    own_BTPI = jnp.take_along_axis(
        probabilities_BTPZ, jnp.minimum(place_BTI, Z - 1)[:, :, None], axis=-1
    )
    own_BTPI = jnp.where((place_BTI < Z)[:, :, None], own_BTPI, 0.0)
    before = jnp.pad(own_BTPI, ((0, 0),) * 3 + ((q - 1, 0),))
    summed_BTPI = sum(before[..., q - 1 - n : q - 1 - n + needed] for n in range(q))
    return jnp.asarray(summed_BTPI).reshape(*own_BTPI.shape[:3], n_blocks, r).sum(axis=-1)


def select(scores_BTPJ: jax.Array, queries: Queries, pattern: Pattern) -> Selection:
    """Chooses the `blocks` blocks of the highest scores that begin at or before each query.

    The first block, the query's own and the one before are always chosen. Of equal scores, the
    earlier.

    Returns:
      numbers of blocks, [B, T, P, X], counted from the beginning of the document.
    """
    number_11J = _numbers(scores_BTPJ.shape[-1], 3)
    own_BT1 = ((queries.places_BT - queries.first_BT) // pattern.size)[:, :, None]
    forced_BTJ = (number_11J == 0) | (number_11J >= own_BT1 - 1)
    scores_BTPJ = jnp.where(forced_BTJ[:, :, None], jnp.inf, scores_BTPJ)
    visible_BTJ = number_11J <= own_BT1
    return sparse_attention.select(scores_BTPJ, visible_BTJ[:, :, None], pattern.blocks)


def masked_attention(
    queries: Queries, branch: Branch, selection: Selection, size: int, scale: float
) -> jax.Array:
    """Attends to the selected blocks by masking all other keys: float32 [B, T, N, W]."""
    S = branch.key.length
    places_11S = _numbers(S, 3)
    n_blocks = -(-S // size)
    indices_BTPX, valid_BTPX = selection
    hits_BTPXJ = indices_BTPX[..., None] == _numbers(n_blocks, 5)
    chosen_BTPJ = (hits_BTPXJ & valid_BTPX[..., None]).any(axis=3)
    block_BTS = (places_11S - queries.first_BT[:, :, None]) // size
    chosen_BTPS = jnp.take_along_axis(chosen_BTPJ, jnp.maximum(block_BTS, 0)[:, :, None], axis=-1)
    own_BTS = (block_BTS >= 0) & (places_11S <= queries.places_BT[:, :, None])
    k_BPSH = branch.key.whole()
    grouped = _grouped(queries.q_BTNH, k_BPSH.shape[1])
    scores_BTPGS = _product("BTPGH,BPSH->BTPGS", grouped, k_BPSH) * scale
    weights_BTPGS = _softmax(scores_BTPGS, (chosen_BTPS & own_BTS[:, :, None])[:, :, :, None])
    return _mix(weights_BTPGS, branch.value.whole())


def gathered_attention(
    queries: Queries, branch: Branch, selection: Selection, size: int, scale: float
) -> jax.Array:
    """Attends to the selected blocks, and reads nothing else: float32 [B, T, N, W]."""
    indices_BTPX, valid_BTPX = selection
    B, T, P, X = indices_BTPX.shape
    S = branch.key.length
    size_here = min(size, S)
    begin_BTPX = queries.first_BT[:, :, None, None] + indices_BTPX * size
    # A block that ends after the row is moved back; what it repeats of the one before is masked.
    from_BTPX = jnp.clip(begin_BTPX, 0, S - size_here)
    places_BTPXU = from_BTPX[..., None] + _numbers(size_here, 5)
    visible_BTPXU = (
        valid_BTPX[..., None]
        & (places_BTPXU >= begin_BTPX[..., None])
        & (places_BTPXU <= queries.places_BT[:, :, None, None, None])
    )
    wanted_BPTX = jnp.moveaxis(places_BTPXU, 2, 1).reshape(B, P, T, X * size_here)
    k_BPTXH, v_BPTXW = branch.key.take(wanted_BPTX), branch.value.take(wanted_BPTX)
    grouped = _grouped(queries.q_BTNH, P)
    scores_BTPGX = _product("BTPGH,BPTXH->BTPGX", grouped, k_BPTXH) * scale
    visible_BTP1X = visible_BTPXU.reshape(B, T, P, 1, X * size_here)
    weights_BTPGX = _softmax(scores_BTPGX, visible_BTP1X).astype(v_BPTXW.dtype)
    out_BTPGW = _product("BTPGX,BPTXW->BTPGW", weights_BTPGX, v_BPTXW)
    return out_BTPGW.reshape(B, T, -1, out_BTPGW.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def table_attention(
    queries: Queries, branch: Branch, selection: Selection, size: int, scale: float
) -> jax.Array:
    """Computes what `gathered_attention` does by the TPU's kernel, where documents begin at
    multiples of a block; its gradient is that of the gathered form.
    """
    B, T, N, _ = queries.q_BTNH.shape
    begin_BT11 = queries.first_BT[:, :, None, None] // size
    table_BTPX = jnp.where(selection.valid_BTJ, begin_BT11 + selection.indices_BTJ, -1)
    (k_LBPSH, layer), (v_LBPSW, _) = branch.key, branch.value
    out_BTPGW = block_kernel.kernel_attention(
        _grouped(queries.q_BTNH, k_LBPSH.shape[2]), k_LBPSH, v_LBPSW, layer, table_BTPX,
        queries.places_BT, size=size, scale=scale,
    )  # fmt: skip
    return out_BTPGW.reshape(B, T, N, -1)


def _table_forward(queries, branch, selection, size, scale):
    return table_attention(queries, branch, selection, size, scale), (queries, branch, selection)


def _table_backward(size, scale, residuals, gradient_BTNW):
    queries, branch, selection = residuals

    def gathered(q_BTNH: jax.Array, key_LBPSH: jax.Array, value_LBPSW: jax.Array) -> jax.Array:
        stacks = Branch(Stack(key_LBPSH, branch.key.layer), Stack(value_LBPSW, branch.value.layer))
        return gathered_attention(queries._replace(q_BTNH=q_BTNH), stacks, selection, size, scale)

    inputs = queries.q_BTNH, branch.key.stack_LBPSX, branch.value.stack_LBPSX
    of_q, *of_stacks = jax.vjp(gathered, *inputs)[1](gradient_BTNW)
    nothing: Any = None  # of what is no number
    of_queries = Queries(of_q, nothing, nothing, nothing)
    return of_queries, Branch(*(Stack(x, nothing) for x in of_stacks)), None


table_attention.defvjp(_table_forward, _table_backward)


def window_attention(queries: Queries, branch: Branch, *, window: int, scale: float) -> jax.Array:
    """Attends to the last `window` tokens of consecutive queries: float32 [B, T, N, W]."""
    B, T = queries.places_BT.shape
    _, _, P, S, _ = branch.key.stack_LBPSX.shape
    size = min(T + window - 1, S)
    begin_B1 = jnp.clip(queries.places_BT[:, :1] - window + 1, 0, S - size)
    places_BS = begin_B1 + _numbers(size, 2)
    age_BTS = queries.places_BT[:, :, None] - places_BS[:, None]
    own_BTS = places_BS[:, None] >= queries.first_BT[:, :, None]
    visible_BTS = (age_BTS >= 0) & (age_BTS < window) & own_BTS
    wanted_BPS = jnp.broadcast_to(places_BS[:, None], (B, P, size))
    scores_BTPGS = _product(
        "BTPGH,BPSH->BTPGS", _grouped(queries.q_BTNH, P), branch.key.take(wanted_BPS)
    )
    weights_BTPGS = _softmax(scores_BTPGS * scale, visible_BTS[:, :, None, None])
    return _mix(weights_BTPGS, branch.value.take(wanted_BPS))


def _numbers(count: int, ndim: int) -> jax.Array:
    """Returns 0 .. count - 1 in the last of `ndim` dims: int32 [1, ..., count]."""
    return lax.iota(jnp.int32, count).reshape(*(1,) * (ndim - 1), count)


def _grouped(q_BTNH: jax.Array, heads: int) -> jax.Array:
    """Splits query heads by the key head that serves them: [B, T, P, N / P, H]."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, heads, N // heads, H)


def _mix(weights_BTPGS: jax.Array, v_BPSW: jax.Array) -> jax.Array:
    """Sums values by weight: float32 [B, T, N, W]."""
    mix = functools.partial(_product, "BTPGS,BPSW->BTPGW")
    out = lax.platform_dependent(
        weights_BTPGS.astype(v_BPSW.dtype),
        v_BPSW,
        # Its runtime (of jax 0.10) lacks this product in bfloat16; that of float32 is the same.
        cpu=lambda *operands: mix(*(x.astype(jnp.float32) for x in operands)),
        default=mix,
    )
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def _softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax over the last dim of what is visible; 0 throughout where nothing is."""
    scores = jnp.where(visible, scores, _MASKED)
    highest = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - highest), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
