"""Runs a training step's forward and backward passes over a pipeline, by any schedule.

The ranks along the mesh axis `pipe` run one program in step: `lax.scan` walks over the ticks of a
`LockStep` table, so that the program's size depends neither on the number of micro-batches nor on
that of layers. Over the other mesh axes the program stays automatic.

What runs is cut in three (`Pieces`): `enter` makes the first stage's input, `stage` is what every
stage computes, `leave` makes the loss out of the last stage's output. In a tick a rank does what
the table says, then sends:

  F  The stage's output. Nothing else is kept of a forward: the stage's input waits, in the slot
     where it arrived, for the backward, which computes the rest again. The last stage's forward is
     left to its backward, which follows at once in most schedules.
  B  All gradients, from the input computed again and the output's gradient that arrived.
  I  The gradient of the input; at the ends also those of `enter` and `leave`, which are on the way.
  W  The gradient of the stage's parameters. It computes the stage again from its input, as I did,
     so the two together cost more than B. That is the price of keeping a stage's input and output
     gradient between them and nothing from inside it.

A rank that has no forward, say, in a tick where another has one computes along, on whatever its
buffers hold, and drops the result; backwards run then from gradients of zero, so that what they add
up does not change. It loses no time by that, having to wait for the other anyhow. It is what makes
every device meet the same collectives in the same order: those of tensor, expert or data
parallelism inside a stage, among them some that the compiler adds and that take in all devices. A
tick without any forward (backward, `enter`, `leave`) on any rank skips it. In a schedule that
overlaps forwards with backwards, both are one computation, whose communication the compiler is free
to hide behind the other's products.

A stage's parameters come and go in the order of stages, each rank with as many as the next; a rank
that needs others (interleaved, DualPipe, DualPipeV) gets them from where they are, once a step, and
their gradients go back the same way. DualPipe's two copies of a stage meet there and are added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsjax.parallel.lockstep import (
    ACTIVATION,
    FULL,
    GRADIENT,
    INPUT,
    NONE,
    WEIGHTS,
    LockStep,
    Payload,
    Work,
    lock_step,
)
from dsjax.parallel.timetable import Schedule

PIPE = "pipe"

Tree = Any
Messages = dict[Payload, jax.Array]  # what a rank sends at the end of a tick


class Pieces(NamedTuple):
    """What a pipeline computes, of one micro-batch. `objective` is float32; the sum of all is what
    the gradients are of. A report is a tree of numbers that are passed on.
    """

    enter: Callable[[Tree, Tree], jax.Array]  # (outer, inputs) -> x
    stage: Callable[[Tree, jax.Array, Tree], tuple[jax.Array, jax.Array, Tree]]
    # (stage's parameters, x, inputs) -> y like x, objective, report
    leave: Callable[[Tree, jax.Array, Tree], tuple[jax.Array, Tree]]
    # (outer, y, inputs) -> objective, report


class Result(NamedTuple):
    stages: Tree  # gradients, [stages, ...] as the parameters
    outer: Tree  # gradients
    stage_reports: Tree  # [stages, ...], summed over micro-batches
    reports: Tree  # of `leave`, [micro-batches, ...]


class _Sums(NamedTuple):
    """What backwards add to."""

    stages: Tree  # gradients, [chunks, ...]
    outer: Tree
    stage_reports: Tree  # [chunks, ...]
    reports: Tree  # [micro-batches, ...]
    gradients: jax.Array  # of outputs, waiting: [chunks, slots, ...]


class _Operation(NamedTuple):
    """What a rank does in a tick, of one kind."""

    kind: str  # F, B, I or W
    on: jax.Array  # bool: whether this rank does it, or only computes along
    microbatch: jax.Array
    chunk: jax.Array
    is_first: jax.Array  # bool: whether it is of the first stage
    is_last: jax.Array
    # bool, the same on all ranks: whether some rank does it at all, on the first, on the last stage
    anywhere: jax.Array
    enters: jax.Array
    leaves: jax.Array


def run(schedule: Schedule, pieces: Pieces, stages: Tree, outer: Tree, inputs: Tree) -> Result:
    """Computes the gradients of the sum of all objectives.

    Call it under `jax.set_mesh`, within `jax.jit`.

    Args:
      stages: parameters, each array [stages, ...], split over `pipe`.
      outer: the parameters of `enter` and `leave`, which every rank holds.
      inputs: each array [micro-batches, ...].

    Raises:
      ValueError: schedule, mesh, parameters and inputs do not fit together.
    """
    _check(schedule, stages, inputs)
    table = lock_step(schedule)
    everywhere, split = PartitionSpec(), PartitionSpec(PIPE)
    program = _Program(table, pieces, schedule.n_stages, schedule.n_microbatches)
    # Not checked for what differs between ranks (check_vma): all that the pieces compute does, and
    # they know nothing of this axis.
    return jax.shard_map(
        program.run,
        in_specs=(PartitionSpec(None, PIPE), everywhere, split, split, everywhere, everywhere),
        out_specs=Result(split, everywhere, split, everywhere),
        axis_names={PIPE},
        check_vma=False,
    )(*_rows(table, schedule.n_stages), jnp.asarray(table.stages), stages, outer, inputs)


def _check(schedule: Schedule, stages: Tree, inputs: Tree) -> None:
    ranks = jax.sharding.get_abstract_mesh().shape.get(PIPE, 1)
    if ranks != schedule.n_ranks:
        raise ValueError(
            f"schedule {schedule.name} is for {schedule.n_ranks} ranks, the mesh has "
            f"mesh.pipe={ranks}; make them equal"
        )
    for name, tree, want in [
        ("stages", stages, schedule.n_stages),
        ("micro-batches", inputs, schedule.n_microbatches),
    ]:
        found = {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
        if found != {want}:
            raise ValueError(
                f"schedule {schedule.name} has {want} {name}, the arrays have {sorted(found)}; "
                "their leading dimensions must be that"
            )


class _Row(NamedTuple):
    """A tick of the table, on one rank: int32 [ranks] (inside, [1])."""

    forward: Work
    backward: Work
    backward_kind: np.ndarray
    arrivals: dict[tuple[Payload, int], Work]


def _rows(table: LockStep, n_stages: int) -> tuple[_Row, dict[str, np.ndarray]]:
    """Returns the table [ticks, ranks], and for each kind whether any rank does it in a tick, on
    the first, on the last stage: bool [ticks, 3].
    """
    ranks = np.arange(table.stages.shape[0])[None]
    anywhere = {}
    for kind, (work, mine) in {
        "F": (table.forward, table.forward.microbatch != NONE),
        **{
            kind: (table.backward, table.backward_kind == code) for kind, code in _BACKWARDS.items()
        },
    }.items():
        stage = table.stages[ranks, work.chunk]
        first, last = mine & (stage == 0), mine & (stage == n_stages - 1)
        if kind == "F":
            mine, first = mine & ~last, first & ~last  # see the module's docstring
        anywhere[kind] = np.stack([mine.any(1), first.any(1), last.any(1)], axis=1)
    row = _Row(table.forward, table.backward, table.backward_kind, table.arrivals)
    return row, anywhere


_BACKWARDS = {"B": FULL, "I": INPUT, "W": WEIGHTS}


class _Program:
    """The program of one rank; arrays are its own part."""

    def __init__(self, table: LockStep, pieces: Pieces, n_stages: int, n_microbatches: int):
        self.table, self.pieces = table, pieces
        self.n_stages, self.n_microbatches = n_stages, n_microbatches
        self.n_ranks, self.n_chunks = table.stages.shape
        self.slots = {
            ACTIVATION: max(table.activation_slots, 1),
            GRADIENT: max(table.gradient_slots, 1),
        }

    def run(
        self, rows: _Row, anywhere: Tree, own: jax.Array, stages: Tree, outer: Tree, inputs: Tree
    ) -> Result:
        """Args: `own`: [1, chunks], the stages that this rank works on."""
        self.own = own[0]
        self.stages = jax.tree.map(self._fetch, stages)
        self.outer, self.inputs = outer, inputs
        x, stage_report, report = self._shapes()
        self.nothing = jnp.zeros(x.shape, x.dtype)
        waiting = {
            payload: jnp.zeros((self.n_chunks, slots, *x.shape), x.dtype)
            for payload, slots in self.slots.items()
        }
        sums = _Sums(
            jax.tree.map(jnp.zeros_like, self.stages),
            jax.tree.map(jnp.zeros_like, outer),
            _zeros(stage_report, self.n_chunks),
            _zeros(report, self.n_microbatches),
            waiting[GRADIENT],
        )
        (_, sums), _ = jax.lax.scan(self._tick, (waiting[ACTIVATION], sums), (rows, anywhere))
        return Result(
            jax.tree.map(self._return, sums.stages),
            jax.lax.psum(sums.outer, PIPE),
            jax.tree.map(self._return, sums.stage_reports),
            jax.lax.psum(sums.reports, PIPE),
        )

    def _shapes(self) -> tuple[Tree, Tree, Tree]:
        """Returns the shapes of a stage's input, of its report, and of the report of `leave`."""

        def once(stages: Tree, outer: Tree, inputs: Tree) -> tuple[Tree, Tree, Tree]:
            x = self.pieces.enter(outer, _at(inputs, 0))
            y, _, stage_report = self.pieces.stage(_at(stages, 0), x, _at(inputs, 0))
            assert (y.shape, y.dtype) == (x.shape, x.dtype), "stages pass on what they take"
            return x, stage_report, self.pieces.leave(outer, y, _at(inputs, 0))[1]

        return jax.eval_shape(once, self.stages, self.outer, self.inputs)

    # Where stages are: stage s comes in on rank s // n, as its number s % n.

    def _moves(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Yields place, chunk and (rank that stores, rank that works) of what must be moved."""
        n_stored = self.n_stages // self.n_ranks
        for chunk in range(self.n_chunks):
            for place in range(n_stored):
                pairs = [
                    (int(stage) // n_stored, rank)
                    for rank, stage in enumerate(self.table.stages[:, chunk])
                    if stage % n_stored == place
                ]
                if pairs:
                    yield place, chunk, pairs

    def _fetch(self, stored: jax.Array) -> jax.Array:
        """[stored stages, ...] -> ppermute(pipe) -> [chunks, ...], the stages that it works on."""
        chunks: list[Any] = [0] * self.n_chunks
        for place, chunk, pairs in self._moves():
            chunks[chunk] += self._move(stored[place], pairs)
        return jnp.stack(chunks)

    def _return(self, worked: jax.Array) -> jax.Array:
        """[chunks, ...] -> ppermute(pipe) -> [stored stages, ...]; the transpose of `_fetch`."""
        stored: list[Any] = [0] * (self.n_stages // self.n_ranks)
        for place, chunk, pairs in self._moves():
            stored[place] += self._move(worked[chunk], [(to, source) for source, to in pairs])
        return jnp.stack(stored)

    def _move(self, x: jax.Array, pairs: list[tuple[int, int]]) -> jax.Array:
        """Zeros on ranks that get nothing."""
        if pairs == [(rank, rank) for rank in range(self.n_ranks)]:
            return x
        return jax.lax.ppermute(x, PIPE, pairs)

    def _tick(
        self, carry: tuple[jax.Array, _Sums], row: tuple[_Row, Tree]
    ) -> tuple[tuple[jax.Array, _Sums], None]:
        activations, sums = carry
        here = jax.tree.map(lambda x: x[0], row[0])
        messages: Messages = {ACTIVATION: self.nothing, GRADIENT: self.nothing}
        for group in self._groups():
            operations = [self._operation(kind, here, row[1][kind]) for kind in group]
            index = sum(op.anywhere.astype(jnp.int32) << i for i, op in enumerate(operations))
            branches = [
                self._branch([op for i, op in enumerate(operations) if subset >> i & 1])
                for subset in range(1 << len(operations))
            ]
            sums, messages = jax.lax.switch(index, branches, activations, sums, messages)
        buffers = {ACTIVATION: activations, GRADIENT: sums.gradients}
        for (payload, shift), work in here.arrivals.items():
            pairs = [(rank, (rank + shift) % self.n_ranks) for rank in range(self.n_ranks)]
            buffers[payload] = self._store(
                buffers[payload], payload, work, self._move(messages[payload], pairs)
            )
        return (buffers[ACTIVATION], sums._replace(gradients=buffers[GRADIENT])), None

    def _groups(self) -> list[str]:
        """The kinds of operations that the schedule has, together those that it overlaps."""
        table = self.table
        overlaps = (table.forward.microbatch != NONE) & (table.backward.microbatch != NONE)
        backwards = [k for k, code in _BACKWARDS.items() if (table.backward_kind == code).any()]
        if overlaps.any():
            return ["FB", *(kind for kind in backwards if kind != "B")]
        return ["F", *backwards]

    def _operation(self, kind: str, here: Any, anywhere: jax.Array) -> _Operation:
        work = here.forward if kind == "F" else here.backward
        stage = self.own[work.chunk]
        is_last = stage == self.n_stages - 1
        if kind == "F":
            on = (work.microbatch != NONE) & ~is_last
        else:
            on = here.backward_kind == _BACKWARDS[kind]
        return _Operation(
            kind,
            on,
            # Whoever computes along does so on some micro-batch and chunk that exist.
            jnp.maximum(work.microbatch, 0),
            jnp.maximum(work.chunk, 0),
            on & (stage == 0),
            on & is_last,
            *anywhere,
        )

    def _branch(self, operations: list[_Operation]) -> Callable[..., tuple[_Sums, Messages]]:
        def branch(activations: jax.Array, sums: _Sums, messages: Messages):
            messages = dict(messages)
            for op in operations:
                x = self._input(op, activations)
                if op.kind == "F":
                    (y, _), _ = self._stage(op)(_at(self.stages, op.chunk), x)
                    messages[ACTIVATION] = y
                elif op.kind == "W":
                    sums = self._weights(op, x, sums)
                else:
                    sums, dx = self._backward(op, x, sums)
                    messages[GRADIENT] = jnp.where(op.on, dx, messages[GRADIENT])
            return sums, messages

        return branch

    def _input(self, op: _Operation, activations: jax.Array) -> jax.Array:
        x = activations[op.chunk, op.microbatch % self.slots[ACTIVATION]]

        def enter(x: jax.Array) -> jax.Array:
            entered = self.pieces.enter(self.outer, _at(self.inputs, op.microbatch))
            return jnp.where(op.is_first, entered, x)

        return jax.lax.cond(op.enters, enter, lambda x: x, x)

    def _stage(self, op: _Operation) -> Callable[..., Any]:
        """The operation's stage as (parameters, x) -> (y, objective), report."""
        inputs = _at(self.inputs, op.microbatch)

        def stage(params: Tree, x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Tree]:
            y, objective, report = self.pieces.stage(params, x, inputs)
            return (y, objective), report

        return stage

    def _backward(self, op: _Operation, x: jax.Array, sums: _Sums) -> tuple[_Sums, jax.Array]:
        """B or I: adds its gradients and reports, and returns that of the stage's input."""
        params, stage = _at(self.stages, op.chunk), self._stage(op)
        if op.kind == "B":
            (y, objective), pull, report = jax.vjp(stage, params, x, has_aux=True)
        else:
            (y, objective), pull, report = jax.vjp(lambda x: stage(params, x), x, has_aux=True)
        dy = sums.gradients[op.chunk, op.microbatch % self.slots[GRADIENT]]
        sums, dy = jax.lax.cond(
            op.leaves, functools.partial(self._leave, op, y), lambda *same: same, sums, dy
        )
        *dparams, dx = pull((jnp.where(op.on, dy, 0), op.on.astype(objective.dtype)))
        if dparams:
            sums = sums._replace(stages=_add_at(op.chunk, sums.stages, *dparams))
        counted = jax.tree.map(lambda x: jnp.where(op.on, x, 0), report)
        sums = sums._replace(stage_reports=_add_at(op.chunk, sums.stage_reports, counted))
        sums = jax.lax.cond(
            op.enters, functools.partial(self._enter_backward, op, dx), lambda same: same, sums
        )
        return sums, dx

    def _weights(self, op: _Operation, x: jax.Array, sums: _Sums) -> _Sums:
        """W: adds the gradient of the stage's parameters."""
        params, stage = _at(self.stages, op.chunk), self._stage(op)
        (_, objective), pull, _ = jax.vjp(lambda params: stage(params, x), params, has_aux=True)
        dy = sums.gradients[op.chunk, op.microbatch % self.slots[GRADIENT]]
        (dparams,) = pull((jnp.where(op.on, dy, 0), op.on.astype(objective.dtype)))
        return sums._replace(stages=_add_at(op.chunk, sums.stages, dparams))

    def _leave(
        self, op: _Operation, y: jax.Array, sums: _Sums, dy: jax.Array
    ) -> tuple[_Sums, jax.Array]:
        """What the last stage does in the middle of its backward, and the gradient of y."""
        inputs = _at(self.inputs, op.microbatch)
        objective, pull, report = jax.vjp(
            lambda outer, y: self.pieces.leave(outer, y, inputs), self.outer, y, has_aux=True
        )
        douter, dy_made = pull(op.is_last.astype(objective.dtype))
        counted = jax.tree.map(lambda x: jnp.where(op.is_last, x, 0), report)
        sums = sums._replace(
            outer=jax.tree.map(jnp.add, sums.outer, douter),
            reports=_add_at(op.microbatch, sums.reports, counted),
        )
        if op.kind == "I":
            mine = Work(jnp.where(op.is_last, op.microbatch, NONE), op.chunk)
            kept = self._store(sums.gradients, GRADIENT, mine, dy_made)
            sums = sums._replace(gradients=kept)
        return sums, jnp.where(op.is_last, dy_made, dy)

    def _enter_backward(self, op: _Operation, dx: jax.Array, sums: _Sums) -> _Sums:
        inputs = _at(self.inputs, op.microbatch)
        _, pull = jax.vjp(lambda outer: self.pieces.enter(outer, inputs), self.outer)
        (douter,) = pull(jnp.where(op.is_first, dx, 0))
        return sums._replace(outer=jax.tree.map(jnp.add, sums.outer, douter))

    def _store(
        self, buffer: jax.Array, payload: Payload, work: Work, value: jax.Array
    ) -> jax.Array:
        chunk, slot = jnp.maximum(work.chunk, 0), work.microbatch % self.slots[payload]
        kept = jnp.where(work.microbatch == NONE, buffer[chunk, slot], value)
        return buffer.at[chunk, slot].set(kept)


def _at(tree: Tree, index: int | jax.Array) -> Tree:
    return jax.tree.map(lambda x: x[index], tree)


def _add_at(index: jax.Array, total: Tree, new: Tree) -> Tree:
    return jax.tree.map(lambda total, new: total.at[index].add(new), total, new)


def _zeros(shapes: Tree, count: int) -> Tree:
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
