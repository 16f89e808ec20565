"""Runs a training step's forward and backward passes over a pipeline, by any schedule.

The ranks along the mesh axis `pipe` run one program in step: `lax.scan` walks over the ticks of a
`LockStep` table, so the program's size depends neither on the number of micro-batches nor on that
of layers. Over the other mesh axes the program stays automatic.

What runs is cut in three (`Pieces`): `enter` makes the first stage's input, `stage` is what every
stage computes, `leave` makes the loss out of the last stage's output.

  Stages. In a tick a rank runs a forward, a backward or both, as the table says, then sends. Only
  stage inputs and the gradients of stage outputs are stored; a backward computes its stage again.
  If any rank has a forward in a tick, every rank runs one. A rank without work of its own computes
  on stale buffers and discards the result; its backward starts from zero gradients, so sums are
  unaffected. This keeps all devices in the same collectives in the same order (those of tensor,
  expert or data parallelism inside a stage, including some that the compiler adds over all
  devices), at no cost in time: the rank would have to wait anyway. Where a schedule overlaps
  forwards with backwards, both are one computation, so that the compiler may hide the
  communication of one behind the products of the other.

  Ends. Embedding, head and whatever else belongs to `enter` and `leave` would make every rank wait
  for the first and the last one. They are data parallel instead: each micro-batch has an owner
  rank, which runs both for it, P micro-batches at once. `enter` runs before the first tick and its
  backward after the last one; `leave` runs in the tick that brings the P-th output. Arrays travel
  between owners and the ranks at the ends by a sum over `pipe` to which all others add zeros.

  Layers. Stages may hold different numbers of layers (`stages.stage_layers`). All ranks run as many
  as the longest stage has; a shorter one computes along on some layer's values and drops the
  result. So uneven stages cost FLOPs on their own rank, but no time beyond the longest stage's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsjax.parallel import stages
from dsjax.parallel.lockstep import ACTIVATION, GRADIENT, NONE, LockStep, Payload, Work, lock_step
from dsjax.parallel.stages import PIPE
from dsjax.parallel.timetable import Schedule

Tree = Any
Arrays = dict[Payload, jax.Array]


class Pieces(NamedTuple):
    """What a pipeline computes for one micro-batch. `objective` is float32; gradients are of the
    sum of all objectives. A report is a tree of numbers that are passed on.
    """

    enter: Callable[[Tree, Tree], tuple[jax.Array, jax.Array]]  # (outer, inputs) -> x, objective
    # (parameters of n layers [n, ...], present, x, inputs) -> y like x, objective, reports [n, ...]
    # A layer that is not present must not count. `present`, bool [n], is None where all are.
    stage: Callable[[Tree, jax.Array | None, jax.Array, Tree], tuple[jax.Array, jax.Array, Tree]]
    leave: Callable[[Tree, jax.Array, Tree], tuple[jax.Array, Tree]]
    # (outer, y, inputs) -> objective, report


class Result(NamedTuple):
    layers: Tree  # gradients, as the parameters
    outer: Tree  # gradients
    layer_reports: Tree  # [layers, ...], summed over micro-batches
    reports: Tree  # of `leave`, [micro-batches, ...]
    entered: Tree  # float32, the sum of the objectives of `enter`


class _Sums(NamedTuple):
    """What backwards add to."""

    layers: Tree  # gradients, [chunks, n, ...]
    outer: Tree
    layer_reports: Tree  # [chunks, n, ...]
    reports: Tree  # [micro-batches, ...]


class _Row(NamedTuple):
    """A tick of the table, on one rank: int32 [ranks] (inside, [1])."""

    forward: Work
    backward: Work
    arrivals: dict[tuple[Payload, int], Work]


class _Tick(NamedTuple):
    """A tick of the table, the same on all ranks: scalars."""

    kinds: Any  # int32: 1 if any rank has a forward, plus 2 if any has a backward
    to_owner: Any
    from_owner: Any
    leaves: Any


def run(
    schedule: Schedule, pieces: Pieces, layers: Tree, outer: Tree, inputs: Tree, specs: Any
) -> Result:
    """Computes the gradients of the sum of all objectives.

    Call it under `jax.set_mesh`, within `jax.jit`.

    Args:
      layers: parameters, each array [layers, ...].
      outer: the parameters of `enter` and `leave`.
      inputs: each array [micro-batches, ...].
      specs: a pair of trees as `layers` and `outer`: the PartitionSpec with which each array is
        stored, `pipe` included (see `stages.bring`).

    Raises:
      ValueError: schedule, mesh, parameters and inputs do not fit together.
    """
    n_layers = _check(schedule, layers, inputs)
    table = lock_step(schedule)
    placed = stages.stage_layers(n_layers, schedule.n_stages)[table.stages]  # [ranks, chunks, n]
    layer_specs, outer_specs = specs
    everywhere, split = PartitionSpec(), PartitionSpec(PIPE)
    row = _Row(table.forward, table.backward, table.arrivals)
    program = _Program(schedule, table, placed, pieces)
    tick = _Tick(program.kinds, table.to_owner, table.from_owner, table.leaves)
    # Not checked for what differs between ranks (check_vma): all that the pieces compute does, and
    # they know nothing of this axis.
    found = jax.shard_map(
        program.run,
        in_specs=(PartitionSpec(None, PIPE), everywhere, split, split, everywhere, everywhere),
        out_specs=Result(split, everywhere, split, everywhere, everywhere),
        axis_names={PIPE},
        check_vma=False,
    )(
        row,
        tick,
        jnp.arange(schedule.n_ranks),
        stages.bring(layers, layer_specs, placed),
        stages.gather(outer, outer_specs),
        inputs,
    )
    return found._replace(
        layers=stages.give_back(found.layers, layer_specs, placed),
        layer_reports=jax.tree.map(lambda x: stages.add_copies(x, placed), found.layer_reports),
    )


def _check(schedule: Schedule, layers: Tree, inputs: Tree) -> int:
    """Returns the number of layers."""
    ranks = jax.sharding.get_abstract_mesh().shape.get(PIPE, 1)
    if ranks != schedule.n_ranks:
        raise ValueError(
            f"schedule {schedule.name} is for {schedule.n_ranks} ranks, the mesh has "
            f"mesh.pipe={ranks}; make them equal"
        )
    found = {leaf.shape[0] for leaf in jax.tree.leaves(inputs)}
    if found != {schedule.n_microbatches}:
        raise ValueError(
            f"schedule {schedule.name} has {schedule.n_microbatches} micro-batches, the arrays "
            f"have {sorted(found)}; their leading dimensions must be that"
        )
    found = {leaf.shape[0] for leaf in jax.tree.leaves(layers)}
    if len(found) != 1 or min(found) < schedule.n_stages:
        raise ValueError(
            f"schedule {schedule.name} has {schedule.n_stages} stages, the arrays have "
            f"{sorted(found)} layers; give all arrays as many layers, at least one per stage"
        )
    return min(found)


class _Program:
    """The program of one rank; arrays are its own part."""

    def __init__(self, schedule: Schedule, table: LockStep, placed: np.ndarray, pieces: Pieces):
        """Args: placed: int32 [ranks, chunks, n], the layers that each rank works on."""
        self.table, self.placed, self.pieces = table, placed, pieces
        self.n_ranks, self.n_microbatches = schedule.n_ranks, schedule.n_microbatches
        forward, backward = (
            (work.microbatch != NONE).any(axis=1) for work in (table.forward, table.backward)
        )
        self.kinds = (forward + 2 * backward).astype(np.int32)  # [ticks], of `_Tick`
        self.overlaps = any(len(slot) == 2 for order in schedule.orders for slot in order)
        self.slots: dict[Payload, int] = {
            ACTIVATION: table.activation_slots,
            GRADIENT: table.gradient_slots,
        }

    def run(
        self, rows: _Row, ticks: _Tick, rank: jax.Array, layers: Tree, outer: Tree, inputs: Tree
    ) -> Result:
        """Args: rank: [1], this rank's number."""
        self.rank, self.inputs = rank[0], inputs
        n_chunks, n_layers = self.placed.shape[1:]
        self.layers = jax.tree.map(lambda x: x.reshape(n_chunks, n_layers, *x.shape[1:]), layers)
        self.outer = outer
        here = jnp.asarray(self.placed)[self.rank]
        self.present = here != NONE if (self.placed == NONE).any() else None  # [chunks, n]
        numbers = -(-self.n_microbatches // self.n_ranks)
        owned = np.pad(
            self.table.order,
            (0, numbers * self.n_ranks - self.n_microbatches),
            constant_values=NONE,
        )
        self.owned = jnp.asarray(owned).reshape(numbers, -1)[:, self.rank]  # micro-batch by number
        entered = jax.lax.map(
            lambda number: self._enter(self.outer, number)[0], jnp.arange(numbers)
        )
        x, layer_report, report = self._shapes(entered[0])
        waiting: Arrays = {
            payload: jnp.zeros((n_chunks, slots, *x.shape), x.dtype)
            for payload, slots in self.slots.items()
        }
        sums = _Sums(
            jax.tree.map(jnp.zeros_like, self.layers),
            jax.tree.map(jnp.zeros_like, self.outer),
            _zeros(layer_report, n_chunks),
            _zeros(report, self.n_microbatches),
        )
        # What owners keep by number: inputs of the first stage, which their gradients replace, and
        # outputs of the last stage, which theirs replace.
        kept: Arrays = {ACTIVATION: entered, GRADIENT: jnp.zeros_like(entered)}
        (_, kept, sums), _ = jax.lax.scan(self._tick, (waiting, kept, sums), (rows, ticks))
        (outer_sums, objective), _ = jax.lax.scan(
            self._enter_backward,
            (sums.outer, jnp.float32(0)),
            (jnp.arange(numbers), kept[ACTIVATION]),
        )
        layer_sums, layer_reports = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (sums.layers, sums.layer_reports)
        )
        outer_sums, reports, entered = jax.lax.psum((outer_sums, sums.reports, objective), PIPE)
        return Result(layer_sums, outer_sums, layer_reports, reports, entered)

    def _shapes(self, x: jax.Array) -> tuple[Tree, Tree, Tree]:
        """Returns the shapes of a stage's input, of its report, and of the report of `leave`."""

        def once(layers: Tree, outer: Tree, x: jax.Array, inputs: Tree) -> tuple[Tree, Tree, Tree]:
            inputs = _at(inputs, 0)
            y, _, layer_report = self.pieces.stage(_at(layers, 0), self._present(0), x, inputs)
            assert (y.shape, y.dtype) == (x.shape, x.dtype), "stages pass on what they take"
            return x, layer_report, self.pieces.leave(outer, y, inputs)[1]

        return jax.eval_shape(once, self.layers, self.outer, x, self.inputs)

    def _tick(
        self, carry: tuple[Arrays, Arrays, _Sums], row: tuple[_Row, _Tick]
    ) -> tuple[tuple[Arrays, Arrays, _Sums], None]:
        waiting, kept, sums = carry
        here, tick = jax.tree.map(lambda x: x[0], row[0]), row[1]
        nothing = jnp.zeros_like(waiting[ACTIVATION][0, 0])

        def forward(messages: Arrays, sums: _Sums) -> tuple[Arrays, _Sums]:
            return {**messages, ACTIVATION: self._forward(here.forward, waiting)}, sums

        def backward(messages: Arrays, sums: _Sums) -> tuple[Arrays, _Sums]:
            dx, sums = self._backward(here.backward, waiting, sums)
            return {**messages, GRADIENT: dx}, sums

        def leave(kept: Arrays, sums: _Sums) -> tuple[Arrays, _Sums]:
            return self._leave(tick.leaves, kept, sums)

        messages: Arrays = {ACTIVATION: nothing, GRADIENT: nothing}
        if self.overlaps:
            both = [_same, forward, backward, lambda *given: backward(*forward(*given))]
            branches = [in_ticks(one, self.kinds == kind) for kind, one in enumerate(both)]
            messages, sums = jax.lax.switch(tick.kinds, branches, messages, sums)
        else:
            for bit, compute in enumerate((forward, backward)):
                compute = in_ticks(compute, self.kinds >> bit & 1)
                on = (tick.kinds >> bit & 1) == 1
                messages, sums = jax.lax.cond(on, compute, _same, messages, sums)
        for (payload, shift), work in here.arrivals.items():
            pairs = [(rank, (rank + shift) % self.n_ranks) for rank in range(self.n_ranks)]
            sent = messages[payload]
            arrived = jax.lax.ppermute(sent, PIPE, pairs) if shift else sent
            waiting = self._store(waiting, payload, work, arrived)
        kept = self._to_owners(tick, messages, kept)
        leave = in_ticks(leave, self.table.leaves != NONE)
        kept, sums = jax.lax.cond(tick.leaves != NONE, leave, _same, kept, sums)
        return (self._from_owners(tick, kept, waiting), kept, sums), None

    def _stage(self, work: Work) -> Callable[..., Any]:
        """The stage of a chunk as (parameters, x) -> (y, objective), report."""
        inputs, present = _at(self.inputs, _index(work.microbatch)), self._present(work.chunk)

        def stage(params: Tree, x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Tree]:
            y, objective, report = self.pieces.stage(params, present, x, inputs)
            return (y, objective), report

        return stage

    def _present(self, chunk: int | jax.Array) -> jax.Array | None:
        return None if self.present is None else self.present[_index(chunk)]

    def _forward(self, work: Work, waiting: Arrays) -> jax.Array:
        params, x = _at(self.layers, _index(work.chunk)), self._waits(waiting, ACTIVATION, work)
        return self._stage(work)(params, x)[0][0]

    def _backward(self, work: Work, waiting: Arrays, sums: _Sums) -> tuple[jax.Array, _Sums]:
        """Returns the gradient of the stage's input, and the sums with the other gradients."""
        chunk, on = _index(work.chunk), work.microbatch != NONE
        params, x = _at(self.layers, chunk), self._waits(waiting, ACTIVATION, work)
        (_, objective), pull, report = jax.vjp(self._stage(work), params, x, has_aux=True)
        dy = jnp.where(on, self._waits(waiting, GRADIENT, work), 0)
        dparams, dx = pull((dy, on.astype(objective.dtype)))
        return dx, sums._replace(
            layers=_add_at(chunk, sums.layers, dparams),
            layer_reports=_add_at(chunk, sums.layer_reports, _counted(on, report)),
        )

    def _waits(self, waiting: Arrays, payload: Payload, work: Work) -> jax.Array:
        slot = _index(work.microbatch) % self.slots[payload]
        return waiting[payload][_index(work.chunk), slot]

    def _store(self, waiting: Arrays, payload: Payload, work: Work, value: jax.Array) -> Arrays:
        chunk, slot = _index(work.chunk), _index(work.microbatch) % self.slots[payload]
        buffer = waiting[payload]
        stored = jnp.where(work.microbatch == NONE, buffer[chunk, slot], value)
        return {**waiting, payload: buffer.at[chunk, slot].set(stored)}

    # The ends: every rank for the micro-batches that it owns.

    def _to_owners(self, tick: _Tick, messages: Arrays, kept: Arrays) -> Arrays:
        for (payload, source), place in tick.to_owner.items():
            sent = _sum_of_one(self.rank == source, messages[payload])
            # An output replaces nothing; an input's gradient replaces the input.
            end = GRADIENT if payload == ACTIVATION else ACTIVATION
            number, mine = _index(place) // self.n_ranks, place % self.n_ranks == self.rank
            buffer = kept[end]
            new = jnp.where((place != NONE) & mine, sent, buffer[number])
            kept = {**kept, end: buffer.at[number].set(new)}
        return kept

    def _from_owners(self, tick: _Tick, kept: Arrays, waiting: Arrays) -> Arrays:
        stages = self.table.stages
        for (payload, target), place in tick.from_owner.items():
            mine = place % self.n_ranks == self.rank
            sent = _sum_of_one(mine, kept[payload][_index(place) // self.n_ranks])
            arrives = (place != NONE) & (self.rank == target)
            microbatch = jnp.asarray(self.table.order)[_index(place)]
            stage = 0 if payload == ACTIVATION else stages.max()
            chunk = int(np.flatnonzero(stages[target] == stage)[0])
            work = Work(jnp.where(arrives, microbatch, NONE), chunk)
            waiting = self._store(waiting, payload, work, sent)
        return waiting

    def _enter(self, outer: Tree, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.pieces.enter(outer, _at(self.inputs, _index(self.owned[number])))

    def _enter_backward(
        self, totals: tuple[Tree, jax.Array], row: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[Tree, jax.Array], None]:
        (outer, total), (number, dx), on = totals, row, self.owned[row[0]] != NONE
        (_, objective), pull = jax.vjp(lambda outer: self._enter(outer, number), self.outer)
        (douter,) = pull((jnp.where(on, dx, 0), on.astype(objective.dtype)))
        total = total + jnp.where(on, objective, 0)
        return (jax.tree.map(jnp.add, outer, douter), total), None

    def _leave(self, number: jax.Array, kept: Arrays, sums: _Sums) -> tuple[Arrays, _Sums]:
        """Runs `leave` and its backward; gradients replace the outputs of the last stage."""
        microbatch, on = _index(self.owned[number]), self.owned[number] != NONE
        inputs, y = _at(self.inputs, microbatch), kept[GRADIENT][number]
        objective, pull, report = jax.vjp(
            lambda outer, y: self.pieces.leave(outer, y, inputs), self.outer, y, has_aux=True
        )
        douter, dy = pull(on.astype(objective.dtype))
        sums = sums._replace(
            outer=jax.tree.map(jnp.add, sums.outer, douter),
            reports=_add_at(microbatch, sums.reports, _counted(on, report)),
        )
        return {**kept, GRADIENT: kept[GRADIENT].at[number].set(dy)}, sums


def in_ticks(branch: Callable[..., Any], taken: np.ndarray) -> Callable[..., Any]:
    """Names a branch after how many ticks take it, which profiles show and `dsjax.plan.operations`
    counts by.
    """
    return jax.named_scope(f"{int(taken.sum())}_of_{len(taken)}_ticks")(branch)


def _same(*operands: Any) -> Any:
    return operands


def _index(number: Any) -> Any:
    """A number that may be NONE as one that exists."""
    return jnp.maximum(number, 0)


def _sum_of_one(mine: jax.Array, x: jax.Array) -> jax.Array:
    """Sends one rank's array to all: psum(pipe), all others adding zeros."""
    return jax.lax.psum(jnp.where(mine, x, 0), PIPE)


def _counted(on: jax.Array, report: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.where(on, x, 0), report)


def _at(tree: Tree, index: int | jax.Array) -> Tree:
    return jax.tree.map(lambda x: x[index], tree)


def _add_at(index: jax.Array, total: Tree, new: Tree) -> Tree:
    return jax.tree.map(lambda total, new: total.at[index].add(new), total, new)


def _zeros(shapes: Tree, count: int) -> Tree:
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
