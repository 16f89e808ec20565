"""The pipeline schedules, built for any number of stages P and micro-batches M.

gpipe        All forwards, then all backwards (arXiv:1811.06965).
1f1b         One forward, one backward (PipeDream-flush, arXiv:2006.09503).
interleaved  1F1B with `chunks` stages per rank, P / chunks apart (Megatron-LM, arXiv:2104.04473).
zb1p         1F1B with split backwards; W fills what was bubble (ZB-H1, arXiv:2401.10241).
dualpipe     Micro-batches enter at both ends, so every stage is held twice; forwards overlap
             backwards (DeepSeek-V3, arXiv:2412.19437, section 3.2.1).
dualpipev    DualPipe cut in half: on P / 2 ranks, micro-batches go down the pipe and back.

P counts the pieces that the model is cut into, in every schedule. Each of the P ranks has one
stage; interleaved runs on P / chunks ranks, dualpipev on P / 2. A chunk's weight gradients are
computed in the order of its micro-batches, so schedules that hold a stage once add them up alike.

These are schedules on paper, as published. In step (`dsjax.parallel.lockstep`) gpipe and zb1p run
exactly as 1f1b does, which is at least as fast there and stores no more.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from dsjax.parallel.timetable import Costs, Op, Schedule, Slot


def build(name: str, stages: int, microbatches: int) -> Schedule:
    """Builds a schedule by its name.

    Raises:
      ValueError: the name is unknown, or the schedule cannot be built for these numbers.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no schedule {name!r}, only {', '.join(NAMES)}{hint}")
    _require_positive(name, stages=stages, microbatches=microbatches)
    return _BUILDERS[name](stages, microbatches)


def stages_per_rank(name: str) -> int:
    """Returns into how many stages a rank's share of the layers is cut: 2 where every micro-batch
    passes a rank twice.

    It is 1 in DualPipe: the second stage that a rank holds is a copy of another rank's.
    """
    return 2 if name in ("interleaved", "dualpipev") else 1


def gpipe(stages: int, microbatches: int) -> Schedule:
    return _forwards_and_backwards("gpipe", stages, microbatches, [microbatches] * stages)


def one_forward_one_backward(stages: int, microbatches: int) -> Schedule:
    # A micro-batch is on its way for as many slots as there are ranks to come.
    warmups = range(stages - 1, -1, -1)
    return _forwards_and_backwards("1f1b", stages, microbatches, warmups)


def _forwards_and_backwards(
    name: str, stages: int, microbatches: int, warmups: Iterable[int]
) -> Schedule:
    """Builds a schedule whose ranks alternate after so many forwards each."""
    orders = []
    for rank, warmup in enumerate(warmups):
        ops = [[Op(kind, m, rank) for m in range(microbatches)] for kind in ("F", "B")]
        orders.append(_alternate(*ops, warmup=warmup))
    return _schedule(name, [range(stages)] * microbatches, orders)


def interleaved(stages: int, microbatches: int, chunks: int = 2) -> Schedule:
    """Builds interleaved 1F1B: micro-batches pass the ring of ranks `chunks` times, in rounds of as
    many micro-batches as there are ranks.

    Raises:
      ValueError: the stages do not divide over chunks, or the micro-batches over ranks.
    """
    _require_positive("interleaved", chunks=chunks)
    ranks = stages // chunks
    if stages % chunks or microbatches % ranks:
        valid = "multiples of stages / chunks" if stages % chunks else _some(ranks, ranks)
        raise ValueError(
            f"interleaved needs stages that divide over the {chunks} chunks per rank, and "
            "micro-batches that divide over the ranks (stages / chunks of them); got "
            f"stages={stages}, microbatches={microbatches}; use stages {_some(chunks, chunks)} and "
            f"microbatches {valid}"
        )
    turns = [
        (microbatch, chunk)
        for first in range(0, microbatches, ranks)
        for chunk in range(chunks)
        for microbatch in range(first, first + ranks)
    ]
    orders = []
    for rank in range(ranks):
        forwards = [Op("F", m, chunk * ranks + rank) for m, chunk in turns]
        backwards = [Op("B", m, (chunks - 1 - chunk) * ranks + rank) for m, chunk in turns]
        # The first backward reaches this rank once the whole first round is through all chunks.
        warmup = 2 * (ranks - rank - 1) + (chunks - 1) * ranks
        orders.append(_alternate(forwards, backwards, warmup=warmup))
    route = [stage % ranks for stage in range(stages)]
    return _schedule("interleaved", [route] * microbatches, orders)


def zb1p(stages: int, microbatches: int) -> Schedule:
    """Builds ZB-H1: 1F1B whose backwards run their input half (I) at once. Rank r runs the weight
    half (W) r micro-batches later, so that every rank keeps as many micro-batches as the first.
    """
    orders = []
    for rank in range(stages):
        ops = [[Op(kind, m, rank) for m in range(microbatches)] for kind in ("F", "I")]
        order: list[Slot] = []
        deferred: deque[Op] = deque()
        for slot in _alternate(*ops, warmup=stages - rank - 1):
            order.append(slot)
            if slot[0].kind == "I":
                deferred.append(slot[0]._replace(kind="W"))
            if len(deferred) > rank:
                order.append((deferred.popleft(),))
        order += [(op,) for op in deferred]
        orders.append(order)
    return _schedule("zb1p", [range(stages)] * microbatches, orders)


def dualpipe(stages: int, microbatches: int) -> Schedule:
    """Builds DualPipe: half of the micro-batches enter at the first rank, half at the last.

    Rank r holds the stages r and P-1-r. The second half of the ranks mirrors the first.

    Raises:
      ValueError: P or M is odd, or M < 2P.
    """
    if stages % 2 or microbatches % 2 or microbatches < 2 * stages:
        least = 2 * (stages + stages % 2)
        raise ValueError(
            "dualpipe needs an even number of stages, and an even number of micro-batches of at "
            f"least 2 x stages; got stages={stages}, microbatches={microbatches}; use stages "
            f"{_some(2, 2)} and, for {stages + stages % 2} stages, microbatches {_some(least, 2)}"
        )
    each = microbatches // 2
    orders = []
    for rank in range(stages):
        there, back = _Side(0, rank), _Side(each, stages - 1 - rank)
        near, far = (there, back) if rank < stages // 2 else (back, there)
        distance = min(rank, stages - 1 - rank)
        orders.append(_dualpipe_order(near, far, distance, stages // 2, each))
    down, up = range(stages), range(stages - 1, -1, -1)
    return _schedule("dualpipe", [down] * each + [up] * each, orders)


def dualpipev(stages: int, microbatches: int) -> Schedule:
    """Builds DualPipeV: its ranks do what the first half of DualPipe's ranks does, with one stream
    of micro-batches that turns at the last rank instead of two streams.

    Raises:
      ValueError: P is odd, or M < P.
    """
    if stages % 2 or microbatches < stages:
        least = stages + stages % 2
        raise ValueError(
            "dualpipev needs an even number of stages (two per rank), and at least as many "
            f"micro-batches; got stages={stages}, microbatches={microbatches}; use stages "
            f"{_some(2, 2)} and, for {least} stages, microbatches {_some(least, 1)}"
        )
    ranks = stages // 2
    orders = [
        _dualpipe_order(_Side(0, rank), _Side(0, stages - 1 - rank), rank, ranks, microbatches)
        for rank in range(ranks)
    ]
    route = [min(stage, stages - 1 - stage) for stage in range(stages)]
    return _schedule("dualpipev", [route] * microbatches, orders)


class _Side:
    """One of a DualPipe rank's two streams of micro-batches."""

    def __init__(self, first: int, stage: int) -> None:
        self.stage, self.next_forward, self.next_backward = stage, first, first

    def forward(self) -> Op:
        self.next_forward += 1
        return Op("F", self.next_forward - 1, self.stage)

    def backward(self) -> Op:
        self.next_backward += 1
        return Op("B", self.next_backward - 1, self.stage)


def _dualpipe_order(near: _Side, far: _Side, distance: int, half: int, each: int) -> list[Slot]:
    """Returns a rank's order, in the eight steps of DeepSeek-V3's report.

    Args:
      near, far: the stream that enters at the rank's own end of the pipe, and the other one.
      distance: ranks between that end and this rank.
      half: ranks on this side of the middle, where the streams meet.
      each: micro-batches per stream.
    """
    order: list[Slot] = []
    deferred: deque[Op] = deque()
    to_middle = half - 1 - distance  # ranks

    def do(*ops: Op) -> None:
        order.append(ops)

    def input_gradient(side: _Side) -> None:
        op = side.backward()
        do(op._replace(kind="I"))
        deferred.append(op._replace(kind="W"))

    # 1, 2: the near stream comes first, the far one once it has passed the other half
    for _ in range(2 * to_middle):
        do(near.forward())
    for _ in range(distance + 1):
        do(near.forward())
        do(far.forward())
    # 3: the far stream's first backwards; their W fills the wait for its next forward
    for _ in range(to_middle):
        input_gradient(far)
        do(deferred.popleft())
        do(far.forward())
    # 4: both streams in both directions, every forward overlapped with a backward
    for turn in range(each - 2 * half + distance + 1):
        if turn == 0 and to_middle == 0:
            # The neighbour already waits for this forward, which would end later if overlapped.
            do(near.forward())
            do(far.backward())
        else:
            do(near.forward(), far.backward())
        do(far.forward(), near.backward())
    # 5: the near stream has no forwards left
    for _ in range(to_middle):
        do(far.backward())
        do(far.forward(), near.backward())
    # 6, 7, 8: only backwards; from the middle of step 6 on, the halves that others wait for first
    for turn in range(2 * (distance + 1)):
        side = near if turn % 2 else far
        if turn <= distance:
            do(side.backward())
        else:
            input_gradient(side)
    for _ in range(to_middle):
        do(deferred.popleft())
        input_gradient(near)
    for op in deferred:
        do(op)
    return order


def _alternate(forwards: list[Op], backwards: list[Op], *, warmup: int) -> list[Slot]:
    """Returns `warmup` forwards, then forwards and backwards in turn, then the backwards left."""
    warmup = min(warmup, len(forwards))
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    return [(op,) for op in order + backwards[len(forwards) - warmup :]]


def _schedule(
    name: str, routes: Iterable[Iterable[int]], orders: Iterable[Iterable[Slot]]
) -> Schedule:
    return Schedule(name, tuple(map(tuple, routes)), tuple(map(tuple, orders)))


def _require_positive(schedule: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{schedule}: {name}={number} must be 1, 2, 3, ...")


def _some(first: int, step: int) -> str:
    return ", ".join(str(first + step * i) for i in range(3)) + ", ..."


_BUILDERS = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
NAMES = tuple(_BUILDERS)


class Expected(NamedTuple):
    """What the papers say about a schedule."""

    formula: str  # of a rank's bubble
    bubble: float | None  # None where the formula does not hold: zb1p with M < P has too few W
    live: int  # chunks of micro-batches, on the rank with most
    parameters: int  # stages per device


def expected(schedule: Schedule, costs: Costs | None = None) -> Expected:
    """Returns the published bubble, peak activations and parameters of a schedule built here.

    From DeepSeek-V3 (arXiv:2412.19437), table 2, and DualPipe's repository; GPipe and interleaved
    1F1B (with R ranks) from their papers. The bubbles of zb1p and DualPipe are exact where
    F = B - W = W and F&B = F + B.
    """
    forward, backward, weights, overlapped = Costs() if costs is None else costs
    stages, ranks, count = schedule.n_stages, schedule.n_ranks, schedule.n_microbatches
    chunks = len(schedule.held()[0])
    match schedule.name:
        case "gpipe":
            return Expected("(P-1)(F+B)", (stages - 1) * (forward + backward), count, 1)
        case "1f1b":
            bubble = (stages - 1) * (forward + backward)
            return Expected("(P-1)(F+B)", bubble, min(stages, count), 1)
        case "interleaved":
            live = min(2 * (ranks - 1) + (chunks - 1) * ranks + 1, count * chunks)
            return Expected("(R-1)(F+B)", (ranks - 1) * (forward + backward), live, chunks)
        case "zb1p":
            bubble = (stages - 1) * (forward + backward - 2 * weights)
            full = count >= stages
            return Expected("(P-1)(F+B-2W)", bubble if full else None, min(stages, count), 1)
        case "dualpipe" | "dualpipev":
            bubble = (stages // 2 - 1) * (overlapped + backward - 3 * weights)
            return Expected("(P/2-1)(F&B+B-3W)", bubble, stages + 1, 2)
    raise ValueError(f"nothing is published about a schedule {schedule.name!r}")
