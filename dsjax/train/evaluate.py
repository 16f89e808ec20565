"""An objective's sums on held-out rows: loss, also by position, and bits per byte, which unlike
the loss does not depend on the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.model.head import token_scores
from dsjax.model.inputs import Inputs
from dsjax.model.transformer import Transformer
from dsjax.train import positions
from dsjax.train.objective import Knobs, Objective, Sums, read_batch, replacing
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
    """Mean loss in nats per predicted token, bits per byte of the text of those tokens, and the
    loss of each group of positions (`dsjax.train.positions`), NaN where no token is predicted.
    """

    loss: float
    bits_per_byte: float
    by_position: tuple[float, ...]

    def numbers(self, length: int) -> dict[str, float]:
        """Returns by name what metrics.jsonl says of rows of `length` predicted tokens."""
        by_position = positions.named(self.by_position, length)
        return {"eval_loss": self.loss, "bits_per_byte": self.bits_per_byte, **by_position}


def scorer(
    declared: Transformer, objective: Objective, *, chunk: int
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
    """Builds (state, batch) -> (summed loss in nats, number of targets), each float32 [groups of
    positions], to be jitted.

    The batch is `tokens` and `segment_ids`, int32 [B, T + 1], and what else the objective asks for.
    Only the main model's loss counts, without MTP and balance losses.

    Args:
      declared: the model without values.
      objective: of next tokens (`dsjax.train.loss.next_tokens`).
      chunk: tokens whose logits exist at once, see `dsjax.model.head`.
    """

    def score(state: TrainState, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        model, inputs, (main, *_) = _read(declared, objective, state, batch)
        hidden_BTD = model.forward(inputs).main_BTD
        nats_BT, _ = token_scores(hidden_BTD, model.head_weight(), main.ids, model.policy, chunk)
        # Selected, not multiplied: a position without a target may have a loss that is not finite.
        nats_BT = jnp.where(main.counted > 0, nats_BT, 0.0)
        starts = positions.group_starts(inputs.positions.shape[-1])
        nats, targets = (
            positions.sum_by_position(each_BT, inputs.positions, starts)
            for each_BT in (nats_BT, main.counted)
        )
        return nats, targets

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

    def sums(state: TrainState, batch: dict[str, jax.Array], knobs: Knobs) -> Sums:
        model, inputs, targets = _read(declared, objective, state, batch)
        embeddings = replacing(objective, model, targets)
        hidden = model.forward(inputs, embeddings=embeddings, inner=objective.forward.inner)
        return objective.sums(model, hidden, targets, knobs)

    return sums


def _read(
    declared: Transformer, objective: Objective, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[Transformer, Inputs, Any]:
    """Returns the model, what it reads of a batch [B, T + 1], without MTP modules, and the
    objective's targets.
    """
    objective = objective._replace(forward=objective.forward._replace(mtp=False))
    micro_batches = {name: rows[None] for name, rows in batch.items()}
    inputs, targets = jax.tree.map(lambda x: x[0], read_batch(objective, declared, micro_batches))
    return restored_model(declared, state), inputs, targets


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
        number, each [groups of positions].
      rows: row numbers.
      interrupted: called before each batch; if it returns True, the result is None.
    """
    nats = targets = np.zeros(1)
    for first in range(0, len(rows), batch_size):
        if interrupted():
            return None
        batch = heldout.batch(rows[first : first + batch_size])
        # The last batch is padded to full size, so that one compiled program serves all.
        batch_nats, batch_targets = score(
            {name: _fill(array, batch_size) for name, array in batch.items()}
        )
        nats = nats + np.asarray(batch_nats, np.float64)
        targets = targets + np.asarray(batch_targets, np.float64)
    by_position = np.divide(nats, targets, out=np.full_like(nats, np.nan), where=targets > 0)
    total, n_bytes = float(nats.sum()), float(heldout.row_bytes[list(rows)].sum())
    return Evaluation(
        total / float(targets.sum()), total / math.log(2) / n_bytes, tuple(by_position.tolist())
    )


def _fill(array: np.ndarray, batch_size: int) -> np.ndarray:
    """Appends rows of zeros. Their segment id is 0, so they have no targets."""
    return np.pad(array, ((0, batch_size - len(array)), (0, 0)))
