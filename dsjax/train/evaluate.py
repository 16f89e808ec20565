"""An objective's sums on held-out rows: loss, and bits per byte, which unlike the loss does not
depend on the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dsjax.model.transformer import Transformer
from dsjax.train.objective import Knobs, Objective, Sums, read_batch
from dsjax.train.step import TrainState, restored_model


class Heldout(Protocol):
    """Rows to score; `dsjax.data.packing.HeldoutSequences` is one kind."""

    @property
    def row_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text that each row predicts, float64 [rows]."""
        ...

    def batch(self, rows: Sequence[int], /) -> dict[str, np.ndarray]:
        """Returns the given rows, stacked."""
        ...


class Evaluation(NamedTuple):
    """Mean loss in nats per predicted token, and bits per byte of the text of those tokens."""

    loss: float
    bits_per_byte: float


def scorer(
    declared: Transformer, objective: Objective
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
    """Builds (state, batch) -> (summed loss in nats, number of targets), to be jitted.

    The batch is `tokens` and `segment_ids`, int32 [B, T + 1], and what else the objective asks for.
    Only the main model's loss counts, without MTP and balance losses.

    Args:
      declared: the model without values.
      objective: has the sums `main` and `main_targets`, as pre-training has.
    """
    sums_of = batch_sums(declared, objective)

    def score(state: TrainState, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums = sums_of(state, batch, {})
        return sums["main"], sums["main_targets"]

    return score


def batch_sums(
    declared: Transformer, objective: Objective
) -> Callable[[TrainState, dict[str, jax.Array], Knobs], Sums]:
    """Builds (state, batch, knobs) -> the objective's sums over the batch, to be jitted.

    The batch is what a micro-batch of the objective is, [B, T + 1] per token. MTP modules and
    balance losses rest.

    Args:
      declared: the model without values.
    """
    forward = objective.forward._replace(mtp=False, balance=None, remat="none")
    objective = objective._replace(forward=forward)

    def sums(state: TrainState, batch: dict[str, jax.Array], knobs: Knobs) -> Sums:
        micro_batches = {name: rows[None] for name, rows in batch.items()}
        inputs, targets = jax.tree.map(
            lambda x: x[0], read_batch(objective, declared, micro_batches)
        )
        model = restored_model(declared, state)
        return objective.sums(model, model.forward(inputs), targets, knobs)

    return sums


def evaluate(
    score: Callable[[dict[str, np.ndarray]], tuple[Any, Any]],
    heldout: Heldout,
    rows: Sequence[int],
    *,
    batch_size: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Scores some held-out rows.

    Args:
      score: a batch of `batch_size` rows -> the summed loss of its targets, in nats, and their
        number.
      rows: row numbers.
      interrupted: called before each batch; if it returns True, the result is None.
    """
    nats = targets = 0.0
    for first in range(0, len(rows), batch_size):
        if interrupted():
            return None
        batch = heldout.batch(rows[first : first + batch_size])
        # The last batch is padded to full size, so that one compiled program serves all.
        batch_nats, batch_targets = score(
            {name: _fill(array, batch_size) for name, array in batch.items()}
        )
        nats += float(batch_nats)
        targets += float(batch_targets)
    return Evaluation(
        nats / targets, nats / math.log(2) / float(heldout.row_bytes[list(rows)].sum())
    )


def _fill(array: np.ndarray, batch_size: int) -> np.ndarray:
    """Appends rows of zeros. Their segment id is 0, so they have no targets."""
    return np.pad(array, ((0, batch_size - len(array)), (0, 0)))
