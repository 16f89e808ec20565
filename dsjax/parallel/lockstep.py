"""Lays a pipeline schedule out in ticks, for one program that all ranks run in step.

In a tick every rank runs at most one forward and one backward. If any rank has a forward in a tick,
all ranks wait for it, so a tick costs one forward, one backward or both, whatever each single rank
does. The layout therefore keeps only two things of a schedule: the order of each rank's forwards
and the order of its backwards. Both advance as soon as their inputs have arrived. In the steady
state every rank has one of each in every tick, and no rank waits:

  * A forward may run before a backward that the schedule puts first. A micro-batch that enters
    comes back after a round trip; a rank that held fewer micro-batches (1F1B's published peak)
    would idle in half of the ticks. The price is up to three times the stage inputs of 1F1B.
  * A backward that a schedule splits (I and W) runs whole, where its I stands. Either half would
    compute the stage again, so the two cost more than one whole backward, and in step nobody could
    use the time in between.

GPipe and ZB1P thus become the ticks of 1F1B: no slower than they would be in their own order.

Results go to the next stage, gradients to the previous one. In every schedule that is the
neighbour to the right or left in the ring of ranks, or the rank itself (where DualPipeV turns). A
channel is a payload and a shift, and carries at most one message per rank and tick:

  (ACTIVATION, 1)   outputs, to rank + 1; from the last rank to rank 0 in interleaved
  (GRADIENT, -1)    their gradients, back
  (ACTIVATION, -1), (GRADIENT, 1)  the opposite direction of DualPipe and DualPipeV
  (ACTIVATION, 0), (GRADIENT, 0)   from a rank to itself

With two ranks, left and right are the same rank; all channels between them have the shift 1.

What comes before the first stage and after the last (`enter` and `leave` of the pipeline) is
divided over the ranks by micro-batch, since in step any rank's work is every rank's time. A
micro-batch has an owner for this. Its output waits there until every rank owns one (or none is
left), then all ranks run `leave` on their own at once, in P-fold less time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from dsjax.parallel.timetable import Costs, Op, Schedule

ACTIVATION: Literal["activation"] = "activation"
GRADIENT: Literal["gradient"] = "gradient"
Payload = Literal["activation", "gradient"]
Channel = tuple[Payload, int]

NONE = -1  # no micro-batch, chunk or place in this tick


class Work(NamedTuple):
    """A chunk of a micro-batch for each tick and rank, or NONE."""

    microbatch: Any  # int32 [ticks, ranks]
    chunk: Any  # int32 [ticks, ranks], which of the stages that the rank holds


class LockStep(NamedTuple):
    """What each rank does and receives in each tick (see the module's docstring)."""

    stages: np.ndarray  # int32 [ranks, chunks], the stages whose parameters a rank holds
    forward: Work
    backward: Work
    # What arrives from a neighbour at the end of a tick, as the chunk of the receiving rank that it
    # is for; only the channels that the schedule uses.
    arrivals: dict[Channel, Work]
    # Micro-batches by place: the owner of place p is rank p % ranks, which keeps it as its number
    # p // ranks. Places follow the order in which micro-batches leave the last stage.
    order: np.ndarray  # int32 [micro-batches]
    # At the end of a tick, the place whose array travels between its owner and the rank that holds
    # the first or the last stage: int32 [ticks]. To the owner: the last stage's output, the first
    # stage's input gradient. From the owner, in time for the next tick: the first stage's input,
    # the gradient of the last stage's output.
    to_owner: dict[tuple[Payload, int], np.ndarray]
    from_owner: dict[tuple[Payload, int], np.ndarray]
    leaves: np.ndarray  # int32 [ticks], the number whose micro-batches all owners run `leave` on
    activation_slots: int
    gradient_slots: int


def lock_step(schedule: Schedule) -> LockStep:
    """Lays a schedule out in ticks.

    Raises:
      ValueError: the schedule deadlocks.
    """
    ticks, order, leaves = _layout(schedule)
    place = {microbatch: index for index, microbatch in enumerate(order)}
    shape = (1 + max(ticks.values()), schedule.n_ranks)
    held, last = schedule.held(), schedule.n_stages - 1
    forward, backward = _nothing(shape), _nothing(shape)
    arrivals: dict[Channel, Work] = defaultdict(lambda: _nothing(shape))
    to_owner, from_owner = (
        defaultdict(lambda: np.full(shape[0], NONE, np.int32)) for _ in range(2)
    )
    for op, tick in ticks.items():
        route = schedule.routes[op.microbatch]
        rank, is_forward = route[op.stage], op.kind == "F"
        work = forward if is_forward else backward
        _put(work, tick, rank, op.microbatch, held[rank].index(op.stage))
        payload = ACTIVATION if is_forward else GRADIENT
        start, end = (0, last) if is_forward else (last, 0)
        if op.stage == start:
            from_owner[payload, rank][tick - 1] = place[op.microbatch]
        if op.stage == end:
            to_owner[payload, rank][tick] = place[op.microbatch]
        else:
            neighbour = op.stage + (1 if is_forward else -1)
            target = route[neighbour]
            channel = (payload, _shift(rank, target, shape[1]))
            _put(arrivals[channel], tick, target, op.microbatch, held[target].index(neighbour))
    leave = np.full(shape[0], NONE, np.int32)
    leave[list(leaves)] = range(len(leaves))
    return LockStep(
        stages=np.array(held, np.int32),
        forward=forward,
        backward=backward,
        arrivals=dict(sorted(arrivals.items())),
        order=np.array(order, np.int32),
        to_owner=dict(sorted(to_owner.items())),
        from_owner=dict(sorted(from_owner.items())),
        leaves=leave,
        activation_slots=_slots(schedule, ticks, ACTIVATION),
        gradient_slots=_slots(schedule, ticks, GRADIENT),
    )


def _layout(schedule: Schedule) -> tuple[dict[Op, int], list[int], list[int]]:
    """Returns the tick of every F and B, the order in which micro-batches leave the last stage, and
    the tick at the end of which each group of owners runs `leave`.
    """
    last, ranks = schedule.n_stages - 1, schedule.n_ranks
    queues = [
        [op._replace(kind=kinds[0]) for slot in slots for op in slot if op.kind in kinds]
        for slots in schedule.orders
        for kinds in ("F", "BI")
    ]
    ticks: dict[Op, int] = {}
    order: list[int] = []
    left = 0  # micro-batches whose `leave` has run
    leaves: list[int] = []

    def ready(op: Op) -> bool:
        if op.kind == "F":
            return op.stage == 0 or op._replace(stage=op.stage - 1) in ticks
        if op.stage == last:
            return op.microbatch in order[:left]
        return op._replace(kind="F") in ticks and op._replace(stage=op.stage + 1) in ticks

    tick = 1  # in tick 0 only the first inputs travel
    while any(queues):
        new = [queue.pop(0) for queue in queues if queue and ready(queue[0])]
        ticks |= dict.fromkeys(new, tick)
        order += [op.microbatch for op in new if op.kind == "F" and op.stage == last]
        if len(order) - left >= min(ranks, schedule.n_microbatches - left) > 0:
            left = min(left + ranks, len(order))
            leaves.append(tick)
        elif not new:
            waiting = ", ".join(str(queue[0]) for queue in queues if queue)
            raise ValueError(f"{schedule.name}: deadlock; waiting are {waiting}")
        tick += 1
    return ticks, order, leaves


def makespan(schedule: Schedule, costs: Costs | None = None) -> float:
    """Returns how long the ticks take, `enter` and `leave` not counted.

    Ranks in step wait for one another: if any rank has a forward in a tick, the tick takes one, and
    the same for backwards.
    """
    costs = Costs() if costs is None else costs
    table = lock_step(schedule)
    forward, backward = (
        (work.microbatch != NONE).any(axis=1) for work in (table.forward, table.backward)
    )
    both = costs.forward + costs.backward
    if any(len(slot) == 2 for order in schedule.orders for slot in order):
        both = costs.overlapped
    return float(
        both * (forward & backward).sum()
        + costs.forward * (forward & ~backward).sum()
        + costs.backward * (backward & ~forward).sum()
    )


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
    kind, start, step = ("F", 0, -1) if payload == ACTIVATION else ("B", schedule.n_stages - 1, 1)
    for microbatch, route in enumerate(schedule.routes):
        for stage, rank in enumerate(route):
            source = ticks[Op(kind, microbatch, stage if stage == start else stage + step)]
            arrival = source - 1 if stage == start else source
            stored[rank, stage].append((microbatch, arrival, ticks[Op("B", microbatch, stage)]))
    return max(map(_modulus, stored.values()))


def _modulus(stored: Iterable[tuple[int, int, int]]) -> int:
    """Returns the least n for which no two of (micro-batch, arrival, last use) that are equal
    modulo n are stored at once. What arrives in the tick of another's last use comes after it.
    """
    stored = sorted(stored)
    n = 1
    while any(early[2] > late[1] for early, late in zip(stored, stored[n:], strict=False)):
        n += 1
    return n
