"""Pipeline schedules as data: which rank computes what in which order, checked and timed on paper.

A model is cut into stages. A micro-batch passes them forward in order and backward in reverse
order. A schedule is two tables:

  routes[microbatch][stage]  the rank that works on that stage of that micro-batch
  orders[rank]               what the rank does, slot by slot

A slot holds one operation, or a forward and a full backward whose computation and communication
overlap ("F&B" of DeepSeek-V3, arXiv:2412.19437, section 3.2.1). The kinds of operations:

  F  forward
  B  full backward
  I  its first half: the gradient of the stage's input, which the previous stage waits for
  W  its second half: the gradient of the stage's weights, which no other rank waits for

A schedule has no times. When a slot starts follows from the order and from what its operations
need (`prerequisites`); `simulate` computes the times for given costs. The program that all ranks
run in step takes only the order of forwards and of backwards from it (`dsjax.parallel.lockstep`).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Op(NamedTuple):
    """One operation on one stage of one micro-batch."""

    kind: Kind
    microbatch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}(micro-batch {self.microbatch}, stage {self.stage})"


Slot = tuple[Op, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The two tables (see the module's docstring). Build one with `dsjax.parallel.schedules`."""

    name: str
    routes: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[Slot, ...], ...]

    @property
    def n_ranks(self) -> int:
        return len(self.orders)

    @property
    def n_stages(self) -> int:
        return len(self.routes[0])

    @property
    def n_microbatches(self) -> int:
        return len(self.routes)

    def held(self) -> tuple[tuple[int, ...], ...]:
        """Returns [rank][chunk] -> stage: the stages whose parameters each rank holds.

        Chunks are numbered in the order in which micro-batches reach them, starting with the first
        micro-batch: a chunk is a direction in DualPipe, the way down or back in DualPipeV.
        """
        stages: list[dict[int, None]] = [{} for _ in self.orders]
        for route in dict.fromkeys(self.routes):
            for stage, rank in enumerate(route):
                stages[rank].setdefault(stage)
        return tuple(tuple(found) for found in stages)


class Costs(NamedTuple):
    """How long a chunk's operations take, in any unit."""

    forward: float = 1.0
    backward: float = 2.0  # both halves
    weights: float = 1.0  # the half of `backward` that computes weight gradients
    overlapped: float = 3.0  # a forward and a full backward, overlapped

    def of(self, slot: Slot) -> float:
        if len(slot) == 2:
            return self.overlapped
        return {
            "F": self.forward,
            "B": self.backward,
            "I": self.backward - self.weights,
            "W": self.weights,
        }[slot[0].kind]


class Timing(NamedTuple):
    """When each slot runs, and what follows for each rank."""

    starts: tuple[tuple[float, ...], ...]  # [rank][slot]
    ends: tuple[tuple[float, ...], ...]  # [rank][slot]
    makespan: float  # from the first start to the last end
    busy: tuple[float, ...]  # [rank]
    # [rank], the most chunks of micro-batches at once whose F has begun and whose B or I has not
    # ended
    live: tuple[int, ...]
    # [rank], the same plus those whose W is still to come: a deferred W keeps the input and the
    # output gradient of each of the chunk's products, but not what only I needed
    kept: tuple[int, ...]

    @property
    def bubble(self) -> tuple[float, ...]:
        """Returns, for each rank, the part of the makespan in which it has nothing to do."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble_share(self) -> float:
        """Returns the bubble's share of the time of all ranks."""
        return 1 - sum(self.busy) / (self.makespan * len(self.busy))


def prerequisites(op: Op, n_stages: int) -> Iterator[Op]:
    """Yields what must have ended before `op` starts. I also stands for B, being its first half."""
    if op.kind == "F":
        if op.stage > 0:
            yield op._replace(stage=op.stage - 1)
    elif op.kind == "W":
        yield op._replace(kind="I")
    else:
        yield op._replace(kind="F")
        if op.stage < n_stages - 1:
            yield op._replace(kind="I", stage=op.stage + 1)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timing:
    """Runs the schedule on paper: each rank takes its slots in order, each as soon as possible.

    Sending takes no time. The peaks do not depend on the costs.

    Raises:
      ValueError: the schedule deadlocks; the message says what each rank waits for.
    """
    starts, ends = run(schedule, (Costs() if costs is None else costs).of)
    live, kept = zip(*map(_peaks, schedule.orders), strict=True)
    return Timing(
        starts=starts,
        ends=ends,
        makespan=max(end for row in ends for end in row) - min(row[0] for row in starts),
        busy=tuple(
            sum(end - start for start, end in zip(*rows, strict=True))
            for rows in zip(starts, ends, strict=True)
        ),
        live=live,
        kept=kept,
    )


def run(
    schedule: Schedule, duration: Callable[[Slot], float]
) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
    """Returns the start and the end of every slot, [rank][slot], for slots that take `duration`.

    Raises:
      ValueError: the schedule deadlocks.
    """
    ended: dict[Op, float] = {}
    starts: list[list[float]] = [[] for _ in schedule.orders]
    ends: list[list[float]] = [[] for _ in schedule.orders]
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(schedule.orders):
            for slot in order[len(ends[rank]) :]:
                ready = ends[rank][-1] if ends[rank] else 0.0
                needed = [op for own in slot for op in prerequisites(own, schedule.n_stages)]
                if not all(op in ended for op in needed):
                    break
                starts[rank].append(max([ready, *(ended[op] for op in needed)]))
                ends[rank].append(starts[rank][-1] + duration(slot))
                for op in slot:
                    done = op._replace(kind="I") if op.kind == "B" else op
                    ended[done] = ends[rank][-1]
                progress = True
    waiting = [
        f"rank {rank} with {' & '.join(map(str, slot))} for "
        + ", ".join(
            str(op)
            for own in slot
            for op in prerequisites(own, schedule.n_stages)
            if op not in ended
        )
        for rank, order in enumerate(schedule.orders)
        for slot in order[len(ends[rank]) :][:1]
    ]
    if waiting:
        raise ValueError(f"{schedule.name}: deadlock; waiting are {'; '.join(waiting)}")
    return tuple(map(tuple, starts)), tuple(map(tuple, ends))


def _peaks(order: tuple[Slot, ...]) -> tuple[int, int]:
    """Returns the most chunks `live` and `kept` (see Timing) on a rank with this order."""
    live = kept = most_live = most_kept = 0
    for slot in order:
        kinds = [op.kind for op in slot]
        live, kept = live + kinds.count("F"), kept + kinds.count("F")
        most_live, most_kept = max(most_live, live), max(most_kept, kept)
        live -= kinds.count("B") + kinds.count("I")
        kept -= kinds.count("B") + kinds.count("W")
    return most_live, most_kept


def check(schedule: Schedule) -> None:
    """Checks that a schedule computes a whole step and terminates.

    Every stage of every micro-batch needs one F and either one B or one I and one W, on the rank of
    its route; a slot is one operation or an overlapped (F, B); the order must not deadlock.

    Raises:
      ValueError: the schedule is wrong; lists all problems.
    """
    problems = []
    kinds: dict[tuple[int, int], list[str]] = defaultdict(list)
    for rank, order in enumerate(schedule.orders):
        for place, slot in enumerate(order):
            if len(slot) != 1 and [op.kind for op in slot] != ["F", "B"]:
                problems.append(
                    f"rank {rank}, slot {place} holds {[op.kind for op in slot]}; only one "
                    "operation, or F and B overlapped, can share a slot"
                )
            for op in slot:
                if not (
                    0 <= op.microbatch < schedule.n_microbatches
                    and 0 <= op.stage < schedule.n_stages
                ):
                    problems.append(f"rank {rank}, slot {place}: {op} does not exist")
                    continue
                kinds[op.microbatch, op.stage].append(op.kind)
                owner = schedule.routes[op.microbatch][op.stage]
                if rank != owner:
                    problems.append(f"rank {rank} does {op}, which belongs to rank {owner}")
    for microbatch in range(schedule.n_microbatches):
        for stage in range(schedule.n_stages):
            found = sorted(kinds[microbatch, stage])
            if found not in (["B", "F"], ["F", "I", "W"]):
                problems.append(
                    f"micro-batch {microbatch}, stage {stage} has {found}; it needs one F and "
                    "either one B or one I and one W"
                )
    try:
        run(schedule, lambda slot: 1)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"schedule {schedule.name!r} is wrong:\n  " + "\n  ".join(problems))
