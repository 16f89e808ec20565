"""One layer's part of the cache, as its attention reads and writes it.

An attention class names what it caches per token (`dsjax.model.attention`); the arrays of one name
are [L, B, P, S, X]: layers, rows, heads, positions, channels. A head's positions are contiguous, so
attention reads them as one matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Entries = dict[str, jax.Array]  # name -> [L, B, P, S, X]


class EntryShape(NamedTuple):
    """What one entry holds per position."""

    heads: int
    width: int
    every: int = 1  # tokens per position


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
        written = {
            name: self._write(self.entries[name], starts_B, values)
            for name, values in new_BTPX.items()
        }
        return self._replace(entries=self.entries | written)

    def _write(self, stack_LBPSX: jax.Array, starts_B: jax.Array, new_BTPX: jax.Array) -> jax.Array:
        if new_BTPX.ndim == 3:
            new_BTPX = new_BTPX[:, :, None]
        rows_B = jnp.arange(starts_B.shape[0], dtype=jnp.int32)
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
            new_BTPX.swapaxes(1, 2).astype(stack_LBPSX.dtype),
            numbers,
            indices_are_sorted=True,
            unique_indices=True,
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

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

        def of_row(stack_LPSX: jax.Array, positions_X: jax.Array) -> jax.Array:
            # One gather out of the whole stack: the layer is not copied first.
            rows = stack_LPSX.at[self.layer, :, positions_X]
            return rows.get(mode="promise_in_bounds")

        # Mapped over rows, so that each device gathers from its own.
        gather = jax.vmap(of_row, in_axes=(1, 0))
        return {name: gather(stack, positions_BX) for name, stack in self.entries.items()}
