"""A pipeline schedule as arrays, for one program that every rank runs in step with the others.

Time is cut into ticks; a slot of the schedule takes one tick, whatever it computes. In a tick each
rank runs at most one forward and one backward (both only where the schedule overlaps them), then
every rank sends, and what is sent arrives before the next tick. So the program is a loop over
ticks: look up what this rank does, do it, `ppermute` once per channel, look up where what came in
belongs, store it.

A chunk's output goes to the rank of the next stage, and its input gradient to the rank of the
previous stage. In every schedule that is the neighbour to the right or left in the ring of ranks,
or the rank itself (where DualPipeV turns). So a channel is a payload and a shift, and carries at
most one message from each rank in a tick:

  (ACTIVATION, 1)   outputs, to rank + 1; from the last rank to rank 0 in interleaved
  (GRADIENT, -1)    their gradients, the way back
  (ACTIVATION, -1), (GRADIENT, 1)  what travels the other way, in DualPipe and DualPipeV
  (ACTIVATION, 0), (GRADIENT, 0)   from a rank to itself

Two ranks are each other's left and right neighbours; all that they send has the shift 1.

What waits is stored by (chunk, micro-batch modulo number of slots), where `activation_slots` and
`gradient_slots` are the least that keep apart what is stored at once, as one chunk's micro-batches
come and go in order. A stage's input stays until its B, or its W where the backward is cut in two;
the gradient of its output too, which the last stage makes itself in its I. First stages read their
input from the batch, which is not stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from dsjax.parallel.timetable import Costs, Op, Schedule, run

ACTIVATION: Literal["activation"] = "activation"
GRADIENT: Literal["gradient"] = "gradient"
Payload = Literal["activation", "gradient"]
Channel = tuple[Payload, int]

NONE = -1  # in `microbatch` and `chunk`: nothing in this tick
IDLE, FULL, INPUT, WEIGHTS = range(4)  # in `backward_kind`: nothing, B, I, W
_BACKWARD = {"B": FULL, "I": INPUT, "W": WEIGHTS}


class Work(NamedTuple):
    """A chunk of a micro-batch for each tick and rank, or NONE."""

    microbatch: Any  # int32 [ticks, ranks]
    chunk: Any  # int32 [ticks, ranks], which of the stages that the rank holds


class LockStep(NamedTuple):
    """What each rank does and receives in each tick (see the module's docstring)."""

    stages: np.ndarray  # int32 [ranks, chunks], the stages whose parameters a rank holds
    forward: Work
    backward: Work
    backward_kind: np.ndarray  # int32 [ticks, ranks]: IDLE, FULL, INPUT or WEIGHTS
    # what arrives at the end of a tick, named by the chunk of the receiving rank that it is for;
    # only the channels that the schedule uses
    arrivals: dict[Channel, Work]
    activation_slots: int
    gradient_slots: int

    @property
    def n_ticks(self) -> int:
        return len(self.backward_kind)


def lock_step(schedule: Schedule) -> LockStep:
    """Lays a schedule out in ticks, each slot in the first tick after all that it needs.

    Raises:
      ValueError: the schedule deadlocks.
    """
    starts, _ = run(schedule, lambda slot: 1)
    ticks = {
        op: int(start)
        for order, row in zip(schedule.orders, starts, strict=True)
        for slot, start in zip(order, row, strict=True)
        for op in slot
    }
    shape = (1 + max(ticks.values()), schedule.n_ranks)
    held = schedule.held()
    forward, backward, kind = _nothing(shape), _nothing(shape), np.full(shape, IDLE, np.int32)
    arrivals: dict[Channel, Work] = defaultdict(lambda: _nothing(shape))
    for op, tick in ticks.items():
        route = schedule.routes[op.microbatch]
        rank = route[op.stage]
        work = forward if op.kind == "F" else backward
        _put(work, tick, rank, op.microbatch, held[rank].index(op.stage))
        if op.kind != "F":
            kind[tick, rank] = _BACKWARD[op.kind]
        neighbour = op.stage + (1 if op.kind == "F" else -1)
        if op.kind != "W" and 0 <= neighbour < schedule.n_stages:
            target = route[neighbour]
            channel = (ACTIVATION if op.kind == "F" else GRADIENT, _shift(rank, target, shape[1]))
            _put(arrivals[channel], tick, target, op.microbatch, held[target].index(neighbour))
    return LockStep(
        stages=np.array(held, np.int32),
        forward=forward,
        backward=backward,
        backward_kind=kind,
        arrivals=dict(sorted(arrivals.items())),
        activation_slots=_slots(schedule, ticks, ACTIVATION),
        gradient_slots=_slots(schedule, ticks, GRADIENT),
    )


def makespan(schedule: Schedule, costs: Costs | None = None) -> float:
    """Returns how long the ticks take if each lasts as long as its costliest slot.

    That is the price of running in step, an upper bound: ranks wait for their neighbours only.
    """
    costs = Costs() if costs is None else costs
    starts, _ = run(schedule, lambda slot: 1)
    longest: dict[float, float] = defaultdict(float)
    for order, row in zip(schedule.orders, starts, strict=True):
        for slot, tick in zip(order, row, strict=True):
            longest[tick] = max(longest[tick], costs.of(slot))
    return sum(longest.values())


def _nothing(shape: tuple[int, int]) -> Work:
    return Work(np.full(shape, NONE, np.int32), np.full(shape, NONE, np.int32))


def _put(work: Work, tick: int, rank: int, microbatch: int, chunk: int) -> None:
    assert work.microbatch[tick, rank] == NONE, "two messages on a channel in one tick"
    work.microbatch[tick, rank], work.chunk[tick, rank] = microbatch, chunk


def _shift(source: int, target: int, n_ranks: int) -> int:
    steps = (target - source) % n_ranks
    assert steps in (0, 1, n_ranks - 1), "ranks talk to neighbours only"
    return steps if steps <= 1 else -1


def _slots(schedule: Schedule, ticks: dict[Op, int], payload: Payload) -> int:
    """Returns the least number of slots that keeps apart what a chunk's micro-batches store."""
    stored: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for microbatch, route in enumerate(schedule.routes):
        for stage, rank in enumerate(route):
            if payload == ACTIVATION:
                sources = [Op("F", microbatch, stage - 1)]
            elif stage == schedule.n_stages - 1:
                sources = [Op("I", microbatch, stage)]
            else:
                sources = [Op("B", microbatch, stage + 1), Op("I", microbatch, stage + 1)]
            arrival = [ticks[op] for op in sources if op in ticks]
            if arrival:
                uses = (Op("B", microbatch, stage), Op("W", microbatch, stage))
                last = max(ticks[op] for op in uses if op in ticks)
                stored[rank, stage].append((microbatch, arrival[0], last))
    return max(map(_modulus, stored.values()), default=0)


def _modulus(stored: Iterable[tuple[int, int, int]]) -> int:
    """Returns the least n for which no two of (micro-batch, arrival, last use) that are equal
    modulo n are stored at once. What arrives in the tick of another's last use comes after it.
    """
    stored = sorted(stored)
    n = 1
    while any(early[2] > late[1] for early, late in zip(stored, stored[n:], strict=False)):
        n += 1
    return n
