"""What decoding keeps of the tokens it has seen, for every layer.

MLA keeps a token's normed latent and its rotated key, 576 values a token and layer in V3 where
expanded keys and values would be 40,960; grouped queries keep keys and values. Either is a pair of
arrays [L, B, P, S, X]: layers, rows, key heads (one for MLA, whose latent all heads share),
positions, channels. A head's positions lie together, so that attention reads them as one matrix.

The arrays are of one size from beginning to end and are handed from step to step; under
`jax.jit(donate_argnums=...)` a step writes its own tokens' entries in place and no others. What a
position holds that no token has written, or that padding has, is never seen: a query sees the
positions up to its own, and each of those is written before it is read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsjax.config import ModelConfig
from dsjax.parallel.sharding import constrain, parts

Entries = tuple[jax.Array, jax.Array]  # [L, B, P, S, X] each


class Cache(NamedTuple):
    """The entries of each stack of layers; None for a stack that is absent or not cached."""

    dense: Entries | None
    moe: Entries | None
    mtp: Entries | None

    def pinned(self) -> Cache:
        """Laid out over the current mesh: rows over its batch axes, key heads with the heads'
        weights where their number allows it.
        """
        mesh = jax.sharding.get_abstract_mesh()

        def pin(stack_LBPSX: jax.Array) -> jax.Array:
            divides = not mesh.empty and stack_LBPSX.shape[2] % parts("heads", mesh) == 0
            heads = "heads" if divides else "width"
            return constrain(stack_LBPSX, "end_layers", "batch", heads, "tokens", "width")

        return jax.tree.map(pin, self)


def empty_cache(
    config: ModelConfig, batch: int, length: int, dtype: DTypeLike, *, mtp: bool = False
) -> Cache:
    """Makes room for `length` tokens in each of `batch` rows; `mtp`: for the MTP modules too."""
    if config.attention == "mla":
        heads, widths = 1, (config.kv_lora_rank, config.qk_rope_head_dim)
    else:
        heads, widths = config.kv_heads, (config.qk_head_dim, config.value_head_dim)

    def entries(layers: int) -> Entries | None:
        if not layers:
            return None
        first, second = (jnp.zeros((layers, batch, heads, length, w), dtype) for w in widths)
        return first, second

    return Cache(
        entries(config.n_dense_layers),
        entries(config.n_moe_layers),
        entries(config.n_mtp if mtp else 0),
    )


class LayerCache(NamedTuple):
    """One layer's part of a stack's entries, which stay whole so that they can change in place."""

    entries: Entries
    layer: jax.Array  # int32 scalar

    @property
    def length(self) -> int:
        return self.entries[0].shape[3]

    def append(
        self, starts_B: jax.Array, first_BTPX: jax.Array, second_BTPX: jax.Array
    ) -> LayerCache:
        """Writes each row's T new entries from position `starts_B` on; they must fit."""
        first, second = self.entries
        return self._replace(
            entries=(
                self._write(first, starts_B, first_BTPX),
                self._write(second, starts_B, second_BTPX),
            )
        )

    def _write(self, stack_LBPSX: jax.Array, starts_B: jax.Array, new_BTPX: jax.Array) -> jax.Array:
        rows_B = jnp.arange(starts_B.shape[0], dtype=jnp.int32)
        layer_B = jnp.broadcast_to(self.layer, starts_B.shape)
        # A window [P, T, X] a row.
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
        """The entries at `size` positions from `start` on: [B, P, size, X] each."""

        def block(stack_LBPSX: jax.Array) -> jax.Array:
            _, B, P, _, X = stack_LBPSX.shape
            return lax.dynamic_slice(stack_LBPSX, (self.layer, 0, 0, start, 0), (1, B, P, size, X))[
                0
            ]

        first, second = self.entries
        return block(first), block(second)
