"""What a fine-tuning run learns from: conversations alone, or a teacher as well (`distill.`).

* samples: the conversations' own tokens.
* logits: a teacher's distribution at the tokens that are trained: of a teacher beside the student,
  or (distill.top_k) of one that goes over all rows first and then leaves the devices to the
  student. What it said is kept in the run's folder, `teacher/`, 8 bytes per token and likeliest
  token; a pass that was killed goes on where it was.
* on_policy: the teacher's distribution at the tokens of the student's own answers to the
  conversations' prompts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.checkpoint import store
from dsjax.checkpoint.load import Checkpoint
from dsjax.config.finetuning import FineTuning
from dsjax.parallel import processes
from dsjax.parallel.compilation import Compiled
from dsjax.posttrain import teacher
from dsjax.posttrain.distill import forward_kl, reverse_kl
from dsjax.posttrain.initial import Initial
from dsjax.posttrain.on_policy import OnPolicy
from dsjax.posttrain.row_store import RowStore, weights_digest
from dsjax.posttrain.rows import ConversationRows, FiniteRows, ShuffledRows
from dsjax.posttrain.supervised import supervised
from dsjax.train.batches import place_all
from dsjax.train.objective import Objective
from dsjax.train.session import Interrupted, Session
from dsjax.train.source import RowSource, Source
from dsjax.train.step import declared_model

_FLUSH_SECONDS = 10.0  # between writes of a teacher's pass


class Lessons(NamedTuple):
    """What the steps of a run take and minimise."""

    source: Source
    objective: Objective
    knobs: Mapping[str, Any] = {}  # besides those of the schedule, the same at every step


def lessons(
    config: FineTuning, initial: Initial, rows: ConversationRows, mesh: Mesh, run: Session
) -> Lessons:
    """Prepares a run's lessons; a teacher that is asked first is asked now.

    Raises:
      ValueError: the teacher does not suit the student, the rows or the mesh; says what to do.
      OSError: what it says cannot be written.
      Interrupted: a signal came while the teacher was asked.
    """
    objective = supervised(config)
    if config.distill.kind == "samples":
        return Lessons(_row_source(config, rows, mesh), objective)
    checkpoint = teacher.open_teacher(
        config.distill.teacher, initial.vocabulary, config.shape.vocab_size
    )
    teacher.fits(config, checkpoint, mesh)
    if not config.distill.top_k:
        source, divergence = _row_source(config, rows, mesh), forward_kl
        if config.distill.kind == "on_policy":
            declared = declared_model(config.shape, config.precision)
            source = OnPolicy(config, _prompts(rows), initial.vocabulary, declared, mesh)
            divergence = reverse_kl
        structure, values = teacher.place_teacher(checkpoint, mesh, config.precision.compute)
        objective = teacher.beside(objective, config, structure, divergence)
        return Lessons(source, objective, {"teacher": values})
    said = _said(config, checkpoint, rows, mesh, run)
    source = _row_source(config, teacher.TaughtRows(rows, said), mesh)
    return Lessons(source, teacher.asked_before(objective, config))


def _said(
    config: FineTuning, checkpoint: Checkpoint, rows: ConversationRows, mesh: Mesh, run: Session
) -> Mapping[str, np.ndarray]:
    """Returns what the teacher says of all rows, from disk as far as it was asked before."""
    begun = store.latest(run.folder / "checkpoints") is not None
    kept = teacher.teacher_store(config, run.folder, rows, None)
    if begun and kept.complete:
        if processes.is_first():
            kept.claim(begun=True)
        return kept.read()
    structure, values = teacher.place_teacher(checkpoint, mesh, config.precision.compute)
    kept = teacher.teacher_store(config, run.folder, rows, weights_digest(values))
    if processes.is_first():
        kept.claim(begun=begun)
    done = processes.from_first(kept.done)
    if done < kept.rows:
        ask = jax.jit(
            teacher.likeliest(config, structure),
            out_shardings=NamedSharding(mesh, PartitionSpec()),  # each process can read it
        )
        _ask(config, kept, done, Compiled(ask, mesh), values, rows, run, mesh)
    processes.wait("the teacher's answers are written")
    return kept.read()


def _prompts(rows: ConversationRows) -> list[tuple[int, ...]]:
    if found := rows.prompts():
        return found
    raise ValueError(
        "distill.kind=on_policy answers prompts, and the conversations of sft.files have none; "
        "give lines with a prompt before the reply"
    )


def _row_source(config: FineTuning, rows: FiniteRows, mesh: Mesh) -> RowSource:
    return RowSource(
        ShuffledRows(rows, seed=config.sft.seed),
        mesh,
        micro_batch_size=config.micro_batch_size,
        length=rows.sequence_length + 1,
    )


def _ask(
    config: FineTuning,
    kept: RowStore,
    done: int,
    likeliest: Compiled,
    values: Any,
    rows: ConversationRows,
    run: Session,
    mesh: Mesh,
) -> None:
    """Writes what a teacher says of the rows from `done` on.

    Raises:
      Interrupted: a signal came; what the teacher has said is written.
    """
    show, size = run.display.counting("asking the teacher"), config.micro_batch_size
    waiting: dict[str, list[np.ndarray]] = {name: [] for name in kept.fields}
    # The last batch is filled, so that one compiled program serves all.
    empty = np.zeros((size, rows.sequence_length + 1), np.int32)
    likeliest.compile(values, place_all({"tokens": empty, "segment_ids": empty}, mesh))
    written = time.monotonic()
    with run.stop.deferred():
        for first in range(done, kept.rows, size):
            show(first, kept.rows)
            batch = rows.batch(range(first, min(first + size, kept.rows)))
            count = len(batch["tokens"])
            filled = {
                name: np.pad(batch[name], ((0, size - count), (0, 0)))
                for name in ("tokens", "segment_ids")
            }
            said = likeliest(values, place_all(filled, mesh))
            for name, array in said._asdict().items():
                waiting[name].append(np.asarray(array)[:count])
            stops = run.interrupted()
            last = stops or first + size >= kept.rows
            if processes.is_first() and (last or time.monotonic() - written > _FLUSH_SECONDS):
                kept.append({name: np.concatenate(arrays) for name, arrays in waiting.items()})
                waiting, written = {name: [] for name in waiting}, time.monotonic()
            if stops:
                raise Interrupted
    show(kept.rows, kept.rows)
