"""The objectives of distillation by logits, and the teachers that they compare with.

A teacher beside the student is an argument of the training step (its knob `teacher`): frozen
weights on the same mesh, and one forward pass more per step. A teacher that has been asked before
is a `RowStore` of its likeliest tokens at every position of every row, which come with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsjax.checkpoint.load import Checkpoint, load, open_checkpoint
from dsjax.config.finetuning import FineTuning
from dsjax.model.head import TokenLoss, map_logits, weighted_loss
from dsjax.model.inputs import Inputs, in_sequence
from dsjax.model.transformer import Hidden, Transformer
from dsjax.posttrain.distill import TopK, Valued, forward_kl, top_k, top_k_kl
from dsjax.posttrain.row_store import Field, RowStore
from dsjax.posttrain.rows import FiniteRows
from dsjax.precision.matmul import vocabulary_logits
from dsjax.text.vocabulary import Vocabulary, open_vocabulary
from dsjax.train.objective import Batch, Knobs, Metrics, Objective, Sums, Weights

Divergence = Callable[[jax.Array, jax.Array, float], Valued]


def open_teacher(path: str | Path, vocabulary: Vocabulary, vocab_size: int) -> Checkpoint:
    """Opens a teacher's checkpoint.

    Args:
      vocabulary, vocab_size: the student's.

    Raises:
      ValueError: there is no whole checkpoint, or its tokens are others than the student's.
    """
    checkpoint = open_checkpoint(path)
    own = open_vocabulary(checkpoint.tokenizer_folder, checkpoint.model.vocab_size)
    sizes = checkpoint.model.vocab_size, vocab_size
    same = own.coder.inner.get_vocab() == vocabulary.coder.inner.get_vocab()
    if same and sizes[0] == sizes[1]:
        return checkpoint
    differ = f"{sizes[0]} logits and {sizes[1]}" if same else "their tokenizers differ"
    raise ValueError(
        f"distill.teacher={path} has another vocabulary than the student ({differ}), and their "
        "logits are compared token by token; use a teacher of the same family, or train on its "
        "samples instead (tools/sample.py, distill.kind=samples)"
    )


def place_teacher(checkpoint: Checkpoint, mesh: Mesh, dtype: str) -> tuple[Any, nnx.State]:
    """Loads a teacher onto the student's mesh; returns its structure and its values, in the type
    that the student computes in.
    """
    return nnx.split(load(checkpoint, mesh=mesh, dtype=dtype))


def beside(
    objective: Objective, config: FineTuning, structure: Any, divergence: Divergence = forward_kl
) -> Objective:
    """Returns the objective of a student whose teacher's values are the knob `teacher`.

    Args:
      objective: of fine-tuning, for how the model runs.
      structure: the teacher's, from `place_teacher`.
    """
    temperature = config.distill.temperature

    def targets(batch: Batch) -> dict[str, Any]:
        inputs = in_sequence(
            batch["tokens"][..., :-1], batch["segment_ids"][..., :-1], isolate=True, n_mtp=0
        )
        return {"counted": _counted(batch), "inputs": inputs}

    def sums(model: Transformer, hidden: Hidden, targets: Any, knobs: Knobs) -> Sums:
        teacher: Transformer = nnx.merge(structure, knobs["teacher"])
        inputs: Inputs = targets["inputs"]
        known_BTE = jax.lax.stop_gradient(teacher.forward(inputs).main_BTD)

        def loss(logits: jax.Array, known: jax.Array, heads: tuple[jax.Array, ...]) -> Valued:
            return divergence(
                logits, vocabulary_logits(known, heads[0], teacher.policy), temperature
            )

        heads = (jax.lax.stop_gradient(teacher.head_weight()),)
        return _sums(config, loss, model, hidden, known_BTE, targets["counted"], heads)

    return _objective(objective, targets, sums)


def asked_before(objective: Objective, config: FineTuning) -> Objective:
    """Returns the objective of a student whose batches have the teacher's likeliest tokens:
    `teacher_ids`, int32 [..., T + 1, K], and `teacher_logp`, float32 [..., T + 1, K + 1].

    Args:
      objective: of fine-tuning, for how the model runs.
    """
    temperature = config.distill.temperature

    def targets(batch: Batch) -> dict[str, Any]:
        # The length comes last while the devices' order is made.
        known = {
            name: jnp.moveaxis(batch[f"teacher_{name}"][..., :-1, :], -1, 1)
            for name in TopK._fields
        }
        return {"counted": _counted(batch), **known}

    def sums(model: Transformer, hidden: Hidden, targets: Any, knobs: Knobs) -> Sums:
        del knobs
        known = TopK(*(jnp.moveaxis(targets[name], 0, -1) for name in TopK._fields))

        def loss(logits: jax.Array, known: TopK, heads: tuple[jax.Array, ...]) -> Valued:
            del heads
            return top_k_kl(logits, known, temperature)

        return _sums(config, loss, model, hidden, known, targets["counted"])

    return _objective(objective, targets, sums)


def _counted(batch: Batch) -> jax.Array:
    """Marks the positions that predict a trained token, float32 [..., T]."""
    here, there = batch["segment_ids"][..., :-1], batch["segment_ids"][..., 1:]
    counted = (batch["weights"][..., 1:] > 0) & (here == there) & (here > 0)
    return counted.astype(jnp.float32)


def _objective(
    objective: Objective,
    targets: Callable[[Batch], Any],
    sums: Callable[[Transformer, Hidden, Any, Knobs], Sums],
) -> Objective:
    def weights(targets: Any, knobs: Knobs) -> Weights:
        del knobs
        counts = targets["counted"].sum(axis=(1, 2))
        total = jnp.maximum(counts.sum(), 1.0)
        return Weights({"kl": jnp.broadcast_to(1.0 / total, counts.shape)}, counts / total)

    def metrics(sums: Sums) -> Metrics:
        return {"loss": sums["kl"] / jnp.maximum(sums["targets"], 1.0)}

    forward = objective.forward._replace(mtp=False)
    return Objective(forward, targets, weights, sums, metrics)


def _sums(
    config: FineTuning,
    loss: TokenLoss,
    model: Transformer,
    hidden: Hidden,
    known_BTX: Any,
    counted_BT: jax.Array,
    heads: tuple[jax.Array, ...] = (),
) -> Sums:
    total = weighted_loss(
        loss,
        hidden.main_BTD,
        model.head_weight(),
        known_BTX,
        counted_BT,
        model.policy,
        config.train.loss_chunk,
        heads,
    )
    return {"kl": total, "targets": counted_BT.sum()}


def likeliest(
    config: FineTuning, structure: Any
) -> Callable[[nnx.State, dict[str, jax.Array]], TopK]:
    """Builds (values, batch of `tokens` and `segment_ids`, int32 [B, T + 1]) -> the teacher's
    likeliest tokens after each of the T, to be jitted.
    """
    k, temperature = config.distill.top_k, config.distill.temperature

    def run(values: nnx.State, batch: dict[str, jax.Array]) -> TopK:
        model: Transformer = nnx.merge(structure, values)
        hidden_BTD = model.hidden(
            batch["tokens"][:, :-1], batch["segment_ids"][:, :-1], mtp=False
        ).main_BTD
        return map_logits(
            lambda logits, _: top_k(logits, k, temperature),
            hidden_BTD,
            model.head_weight(),
            (),
            model.policy,
            config.train.loss_chunk,
        )

    return run


def teacher_store(
    config: FineTuning, folder: Path, rows: FiniteRows, weights: str | None
) -> RowStore:
    """Describes what a teacher says of a run's rows, in the run's folder.

    Args:
      weights: the teacher's `weights_digest`; None: it was checked before.
    """
    length, k = config.sft.sequence_length, config.distill.top_k
    identity = {
        "rows_of": rows.fingerprint,
        "weights": weights,
        "temperature": config.distill.temperature,
        "compute": config.precision.compute,
    }
    fields = {"ids": Field((length, k), "int32"), "logp": Field((length, k + 1), "float32")}
    return RowStore(folder / "teacher", len(rows), fields, identity)


class TaughtRows:
    """Rows with what a teacher said of each."""

    def __init__(self, rows: FiniteRows, said: Mapping[str, np.ndarray]) -> None:
        """
        Args:
          said: the arrays of `teacher_store`, one entry per row.
        """
        self._rows, self._said = rows, said
        self.sequence_length, self.fingerprint = rows.sequence_length, rows.fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        last = ((0, 1), (0, 0))  # after the last token nothing is predicted
        known = {f"teacher_{name}": np.pad(array[row], last) for name, array in self._said.items()}
        return {**self._rows[row], **known}


def fits(config: FineTuning, checkpoint: Checkpoint, mesh: Mesh) -> None:
    """Checks that a teacher can judge a run's rows.

    Raises:
      ValueError: it cannot; says what to change.
    """
    length, limit = config.sft.sequence_length, checkpoint.model.max_seq_len
    if length > limit:
        raise ValueError(
            f"sft.sequence_length={length} exceeds the max_seq_len={limit} of distill.teacher; "
            "lower it"
        )
    if config.distill.top_k >= checkpoint.model.vocab_size:
        raise ValueError(
            f"distill.top_k={config.distill.top_k} is not less than the vocabulary of "
            f"{checkpoint.model.vocab_size} tokens; use 64 or so, or 0 for all of them"
        )
    if mesh.shape["pipe"] > 1 and not config.distill.top_k:
        asked = " or distill.top_k=64, so that it is asked before training"
        raise ValueError(
            f"mesh.pipe={mesh.shape['pipe']}: a teacher does not run inside a pipeline; set "
            f"mesh.pipe=1{asked if config.distill.kind == 'logits' else ''}"
        )
