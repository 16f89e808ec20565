"""A cache of past tokens that is split over the mesh axis `context` along its positions.

Device r of c holds positions r, r + c, r + 2c, ... Caches are made for the longest text: in
contiguous parts most devices would idle while rows are short. Parts that take turns by pages would
be even to a page, but all recent tokens, which an indexer chooses often, would be with one device.
Taken one by one, every device has equally many of a row's tokens, and of its recent ones, at any
length. A part of a short cache is then the beginning of that of a longer one, and a page's parts
are parts of the row that it is copied to, so rows and pages move between caches and never between
devices.

Each device attends to what it holds. One maximum and one sum over the axis, of a number and of a
vector per row, query and head, join the results; no entry leaves its device. Where an index chooses
keys, each device proposes its best ones, and scores and positions of all proposals are gathered.

Only `context` is split by hand here: the compiler splits rows and heads as everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from dsjax.kernels import sparse_attention
from dsjax.kernels.cached_attention import WHOLE, Attended, Part
from dsjax.parallel.sharding import parts_here

_AXIS = "context"
_ENTRY = PartitionSpec(None, None, None, _AXIS)  # [L, B, P, S, X]
_WHOLE = PartitionSpec()


def update(function: Callable[[Any, Any], Any], parts: Any, whole: Any) -> Any:
    """Changes cache entries, on each device its part of them.

    Args:
      function: (parts, whole) -> entries.
      parts: a tree of entries [L, B, P, S, X]; the function sees [L, B, P, S / c, X].
      whole: a tree of arrays that each device sees whole.
    """
    return _on_parts(function, parts, whole, _ENTRY)


def attend(function: Callable[[Any, Any], Attended], parts: Any, whole: Any) -> jax.Array:
    """Attends from the same queries to each device's part of cache entries, and joins the results:
    [B, T, N, W]. The arguments are those of `update`.
    """
    return _on_parts(lambda *arguments: _joined(function(*arguments)), parts, whole, _WHOLE)


def _on_parts(function: Any, parts: Any, whole: Any, results: PartitionSpec) -> Any:
    if parts_here("length") == 1:
        return function(parts, whole)
    specs = (_ENTRY, _WHOLE)
    return jax.shard_map(function, in_specs=specs, out_specs=results, axis_names={_AXIS})(
        parts, whole
    )


def in_order(entry_LBPSX: jax.Array) -> jax.Array:
    """Returns the positions of a split entry one after another, as an entry that is whole has
    them.
    """
    return _swapped(entry_LBPSX, parts_here("length"))


def in_parts(entry_LBPSX: jax.Array) -> jax.Array:
    """Returns the positions of a whole entry part after part, as a split entry has them."""
    return _swapped(entry_LBPSX, entry_LBPSX.shape[3] // parts_here("length"))


def _swapped(entry_LBPSX: jax.Array, rows: int) -> jax.Array:
    """Transposes the positions, seen as this many rows."""
    L, B, P, S, X = entry_LBPSX.shape
    return entry_LBPSX.reshape(L, B, P, rows, S // rows, X).swapaxes(3, 4).reshape(L, B, P, S, X)


def part() -> Part:
    """Returns the positions of this device's part, inside `update` and `attend`."""
    count = parts_here("length")
    return WHOLE if count == 1 else Part(lax.axis_index(_AXIS), count)


def most(number: jax.Array) -> jax.Array:
    """Returns the largest of all devices' numbers."""
    return number if parts_here("length") == 1 else lax.pmax(number, _AXIS)


def _joined(attended: Attended) -> jax.Array:
    if parts_here("length") == 1:
        return attended.out_BTNW
    # The scores are relative to the highest of all parts, or their exponentials would overflow.
    highest_BTN = lax.pmax(attended.highest_BTN, _AXIS)
    weight_BTN = attended.total_BTN * jnp.exp(attended.highest_BTN - highest_BTN)
    out_BTNW = attended.out_BTNW.astype(jnp.float32) * weight_BTN[..., None]
    # [B, T, N, W] and [B, T, N] -> all_reduce(context) -> the same
    out_BTNW, weight_BTN = lax.psum((out_BTNW, weight_BTN), _AXIS)
    return (out_BTNW / weight_BTN[..., None]).astype(attended.out_BTNW.dtype)


def chosen(
    scores_BTJ: jax.Array, positions_BTJ: jax.Array, visible_BTJ: jax.Array, count: int
) -> jax.Array:
    """Tells which of a device's best keys are among the `count` best of all devices, as
    `sparse_attention.select` chooses them: bool [B, T, J].

    Args:
      positions_BTJ: int32; of equal scores the lowest win.
    """
    if parts_here("length") == 1:
        return visible_BTJ
    keys = sparse_attention.Keys.of(scores_BTJ, positions_BTJ, visible_BTJ)
    # [B, T, J] -> all_gather(context) -> [B, T, c * J], a score and a position of each
    proposed = jax.tree.map(lambda x: lax.all_gather(x, _AXIS, axis=2, tiled=True), keys)
    return sparse_attention.within(keys, sparse_attention.limit(proposed, count))
