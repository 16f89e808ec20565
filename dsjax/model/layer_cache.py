"""One layer's part of the cache, as its attention reads and writes it.

An attention class names what it caches per token (`dsjax.model.attention`); the arrays of one name
are [L, B, P, S, X]: layers, rows, heads, positions, channels. A head's positions are contiguous, so
attention reads them as one matrix.

Devices along `mesh.context` hold a part of the positions each (`dsjax.parallel.split_cache`). They
read it inside `attend` alone, where `length` and all places are those of the part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.kernels import stacked_rows
from dsjax.kernels.cached_attention import Attended, Part
from dsjax.parallel import split_cache

Entries = dict[str, jax.Array]  # name -> [L, B, P, S, X]
# Of a stack; of separate layers each has its own, with L = 1.
StackEntries = Entries | tuple[Entries, ...]


class EntryShape(NamedTuple):
    """What one entry holds per position."""

    heads: int
    width: int
    every: int = 1  # tokens per position
    layers: int | None = None  # that have one; None: all of a stack


class LayerCache(NamedTuple):
    """One layer's part of a stack's entries, which stay whole so that they can change in place."""

    entries: Entries
    layer: jax.Array  # int32 scalar

    @property
    def length(self) -> int:
        """Positions per row, of entries that have one per token."""
        return max(stack.shape[3] for stack in self.entries.values())

    def append(self, starts_B: jax.Array, **new_BTPX: jax.Array) -> LayerCache:
        """Writes each row's T new values of the named entries from position `starts_B` on; they
        must fit. Entries that are not named stay as they are.

        Args:
          new_BTPX: [B, T, P, X] each, or [B, T, X] of an entry with one head.
        """

        def write(entries: Entries, whole: Any) -> Entries:
            layer, starts_B, new = whole
            own = LayerCache(entries, layer)
            return {name: own._write(entries[name], starts_B, new[name]) for name in new}

        named = {name: self.entries[name] for name in new_BTPX}
        written = split_cache.update(write, named, (self.layer, starts_B, new_BTPX))
        return self._replace(entries=self.entries | written)

    def attend(self, function: Callable[..., Attended], *whole: Any) -> jax.Array:
        """Calls `function(part, *whole)` for the part of this cache that each device holds, and
        joins the results: [B, T, N, W].

        Args:
          whole: arrays that each device sees whole.
        """

        def on_part(entries: Entries, whole: Any) -> Attended:
            layer, *others = whole
            return function(LayerCache(entries, layer), *others)

        return split_cache.attend(on_part, self.entries, (self.layer, *whole))

    def _write(self, stack_LBPSX: jax.Array, starts_B: jax.Array, new_BTPX: jax.Array) -> jax.Array:
        if new_BTPX.ndim == 3:
            new_BTPX = new_BTPX[:, :, None]
        if (part := split_cache.part()).n_parts > 1:
            starts_B, new_BTPX = self._own(stack_LBPSX, starts_B, new_BTPX, part)
        new_BPTX = new_BTPX.swapaxes(1, 2).astype(stack_LBPSX.dtype)
        rows_B = jnp.arange(starts_B.shape[0], dtype=jnp.int32)
        if one := stack_LBPSX.shape[:2] == (1, 1):
            # One window of an array that is one layer's and one row's is written twice: otherwise
            # XLA's CPU compiler (jax 0.10.2) selects between old and new, and copies the array.
            rows_B, starts_B, new_BPTX = (
                jnp.concatenate([each, each]) for each in (rows_B, starts_B, new_BPTX)
            )
        layer_B = jnp.broadcast_to(self.layer, starts_B.shape)
        # One window [P, T, X] per row.
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3),
            inserted_window_dims=(0, 1),
            scatter_dims_to_operand_dims=(0, 1, 3),
        )
        return lax.scatter(
            stack_LBPSX,
            jnp.stack([layer_B, rows_B, starts_B], axis=1),
            new_BPTX,
            numbers,
            indices_are_sorted=True,
            unique_indices=not one,
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    def _own(
        self, stack_LBPSX: jax.Array, starts_B: jax.Array, new_BTPX: jax.Array, part: Part
    ) -> tuple[jax.Array, jax.Array]:
        """Takes those of some new values that belong into this part: where each row's first one
        goes, int32 [B], and as many values as any part can get. A row that gets fewer has what the
        cache held in the others' places.
        """
        T, S = new_BTPX.shape[1], stack_LBPSX.shape[3]
        size = -(-T // part.n_parts)
        first_B = jnp.minimum(-(-(starts_B - part.rank) // part.n_parts), S - size)
        places_BX = first_B[:, None] + lax.iota(jnp.int32, size)[None]
        token_BX = part.position(places_BX) - starts_B[:, None]
        is_new_BX = (token_BX >= 0) & (token_BX < T)
        index_BX11 = jnp.clip(token_BX, 0, T - 1)[:, :, None, None]
        taken_BXPY = jnp.take_along_axis(new_BTPX, index_BX11, axis=1).astype(stack_LBPSX.dtype)
        held_BXPY = self._gather(stack_LBPSX, places_BX)
        return first_B, jnp.where(is_new_BX[:, :, None, None], taken_BXPY, held_BXPY)

    def read(self, start: jax.Array | int, size: int) -> Entries:
        """Returns this layer's entries at `size` positions from `start` on: [B, P, size, X]."""

        def block(stack_LBPSX: jax.Array) -> jax.Array:
            _, B, P, _, X = stack_LBPSX.shape
            window = (1, B, P, size, X)
            return lax.dynamic_slice(stack_LBPSX, (self.layer, 0, 0, start, 0), window)[0]

        return {name: block(stack) for name, stack in self.entries.items()}

    def gather(self, positions_BX: jax.Array) -> Entries:
        """Returns this layer's entries at some positions of each row, all within the cache:
        [B, ..., P, X] for int32 [B, ...].
        """
        return {name: self._gather(stack, positions_BX) for name, stack in self.entries.items()}

    def _gather(self, stack_LBPSX: jax.Array, positions_BX: jax.Array) -> jax.Array:
        B, *rest = positions_BX.shape
        # The same positions of all heads.
        places_BPX = jnp.broadcast_to(positions_BX[:, None], (B, stack_LBPSX.shape[2], *rest))
        return jnp.moveaxis(stacked_rows.take(stack_LBPSX, self.layer, places_BPX), 1, -2)
