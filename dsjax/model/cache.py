"""What decoding keeps of the tokens it has seen, for all layers.

Which entries there are is up to the attention class. MLA caches a token's normed latent and its
rotated key, 576 values per token and layer in V3 where expanded keys and values would take 40,960;
grouped-query attention caches keys and values. An entry may have one position for several tokens.

The arrays never change size. They are passed from step to step, and under
`jax.jit(donate_argnums=...)` a step writes its own tokens' entries in place and nothing else.
Unwritten and padded positions are never read: a query attends only to positions up to its own, all
of which have been written by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from dsjax.config import ModelConfig
from dsjax.model.block import attention_class
from dsjax.model.layer_cache import Entries, StackEntries
from dsjax.parallel import split_cache
from dsjax.parallel.sharding import constrain, parts, parts_here


class Cache(NamedTuple):
    """The entries of each stack of layers; None for a stack that is absent or not cached."""

    dense: StackEntries | None
    moe: StackEntries | None
    mtp: Entries | None

    def stacked(self) -> Cache:
        """Returns the entries of separate layers in stacks: the form that all caches can be read
        from, whatever mesh or machine they are of.
        """
        return Cache(_stacked(self.dense), _stacked(self.moe), self.mtp)

    def as_in(self, other: Cache) -> Cache:
        """Returns stacked entries in the form of another cache: separate where its are."""
        return Cache(_as_in(self.dense, other.dense), _as_in(self.moe, other.moe), self.mtp)

    def pinned(self) -> Cache:
        """Lays the entries out over the current mesh as `entry_axes` says."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return self
        return jax.tree.map(lambda entry: constrain(entry, *entry_axes(entry.shape, mesh)), self)

    def insert(self, rows_X: jax.Array, other: Cache, others_X: jax.Array) -> Cache:
        """Replaces whole rows, such as those of finished requests by those of new prompts.

        Args:
          rows_X: int32, the rows that are replaced; all different. A row outside the cache drops
            what would go there.
          other: of the same model, with at most as many positions. Positions beyond `other`'s keep
            what they held, which is never read before it is written again.
          others_X: int32, the row of `other` that takes each place; one row may take several.
        """

        def replace(caches: tuple[Cache, Cache], whole: tuple[jax.Array, jax.Array]) -> Cache:
            rows_X, others_X = whole

            def in_entry(mine_LBPSX: jax.Array, new_LBPSX: jax.Array) -> jax.Array:
                new_LXPSX = new_LBPSX[:, others_X].astype(mine_LBPSX.dtype)
                rows = mine_LBPSX.at[:, rows_X, :, : new_LBPSX.shape[3]]
                return rows.set(new_LXPSX, mode="drop", unique_indices=True)

            return jax.tree.map(in_entry, *caches)

        return split_cache.update(replace, (self, other), (rows_X, others_X))


def entry_axes(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the logical axes of an entry [L, B, P, S, X]: rows over the mesh's batch axes, heads
    with the attention weights' heads where their number divides, positions over `context`
    (`dsjax.parallel.split_cache`).
    """
    heads = "heads" if shape[2] % parts("heads", mesh) == 0 else "width"
    return "end_layers", "batch", heads, "length", "width"


def _stacked(entries: StackEntries | None) -> Entries | None:
    if not isinstance(entries, tuple):
        return entries
    return {name: jnp.concatenate([own[name] for own in entries]) for name in entries[0]}


def _as_in(entries: StackEntries | None, other: StackEntries | None) -> StackEntries | None:
    if not isinstance(other, tuple):
        return entries
    assert isinstance(entries, dict)
    return tuple(
        {name: stack[layer : layer + 1] for name, stack in entries.items()}
        for layer in range(len(other))
    )


def check_split(config: ModelConfig, mesh: Mesh | AbstractMesh | None) -> None:
    """Raises ValueError if the mesh would split a cache that cannot be split."""
    n_parts = parts("length", mesh) if mesh else 1
    if n_parts > 1 and not attention_class(config).splits:
        raise ValueError(
            f"model.attention={config.attention} keeps its cache whole: an entry is made of tokens "
            f"that mesh.context={n_parts} devices would share out; generate with context=1 and "
            "split over data, fsdp, expert or tensor"
        )


def empty_cache(
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: DTypeLike,
    *,
    mtp: bool = False,
    separate: bool = False,
) -> Cache:
    """Makes room for `length` tokens in each of `batch` rows, or for a few more where the current
    mesh splits them into equal parts.

    Args:
      mtp: whether to make room for the MTP modules too.
      separate: whether the layers are (`dsjax.model.separate_layers`), and so their entries, which
        would be copied out of a stack whenever a token attends to them.
    """
    length += -length % parts_here("length")
    shapes = attention_class(config).cached(config)

    def entries(layers: int) -> Entries | None:
        if not layers:
            return None
        return {
            name: jnp.zeros(
                (
                    layers if shape.layers is None else shape.layers,
                    batch,
                    shape.heads,
                    -(-length // shape.every),
                    shape.width,
                ),
                dtype,
            )
            for name, shape in shapes.items()
        }

    def of_stack(layers: int) -> StackEntries | None:
        if not (layers and separate):
            return entries(layers)
        return tuple(own for _ in range(layers) if (own := entries(1)))

    return Cache(
        of_stack(config.n_dense_layers),
        of_stack(config.n_moe_layers),
        entries(config.n_mtp if mtp else 0),
    )
