"""Loss by position: how much a model gains from a longer context.

Positions are those that rope sees: inside the document where documents are isolated, else inside
the row. They are grouped by powers of two: 0 to 31, 32 to 63, 64 to 127, ...
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_FIRST_GROUP = 32  # positions; finer groups have few tokens and tell little
_NO_END = (1 << 31) - 1
_PREFIX = "eval_loss_"


def group_starts(length: int) -> list[int]:
    """Returns the first position of each group in a sequence of `length` tokens."""
    starts = [0]
    while max(2 * starts[-1], _FIRST_GROUP) < length:
        starts.append(max(2 * starts[-1], _FIRST_GROUP))
    return starts


def sum_by_position(
    values_BT: jax.Array, positions_BT: jax.Array, starts: Sequence[int]
) -> jax.Array:
    """Sums the values of the tokens in each group of positions: float32 [groups]."""
    ends = [*starts[1:], _NO_END]
    return jnp.stack(
        [
            jnp.where((positions_BT >= start) & (positions_BT < end), values_BT, 0.0).sum()
            for start, end in zip(starts, ends, strict=True)
        ]
    )


def named(losses: Sequence[float], length: int) -> dict[str, float]:
    """Returns losses by name, such as `eval_loss_32_63`: first and last position of the group.

    Groups without a token (NaN) are left out, and so is the only group of a short sequence.
    """
    starts = group_starts(length)
    ends = [*starts[1:], length]
    found = zip(starts, ends, losses, strict=True)
    if len(starts) == 1:
        return {}
    return {f"{_PREFIX}{start}_{end - 1}": loss for start, end, loss in found if loss == loss}


def is_by_position(name: str) -> bool:
    """Tells whether a number of a run has a name of `named`."""
    return name.startswith(_PREFIX)


def position_of(name: str) -> int:
    """Returns the last position of the group that a name of `named` is of."""
    return int(name.rpartition("_")[2])
