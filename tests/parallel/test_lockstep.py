"""The arrays are enough to run a step: a machine that knows nothing else replays them."""

import dataclasses

import numpy as np
import pytest

from dsjax.parallel import lockstep, schedules
from dsjax.parallel.lockstep import ACTIVATION, GRADIENT, NONE
from dsjax.parallel.timetable import Costs

SIZES = {
    "gpipe": [(1, 2), (2, 3), (4, 6)],
    "1f1b": [(1, 1), (2, 3), (4, 6), (8, 5)],
    "interleaved": [(2, 3), (4, 4), (8, 8), (6, 9)],
    "zb1p": [(1, 3), (2, 3), (4, 6), (8, 5)],
    "dualpipe": [(2, 4), (4, 8), (8, 20)],
    "dualpipev": [(2, 2), (4, 4), (8, 11)],
}
CASES = [(name, *size) for name, sizes in SIZES.items() for size in sizes]


class Replay:
    """Runs the ticks of a LockStep on marks in place of arrays: a mark says whose it is."""

    def __init__(self, table, n_stages):
        self.table, self.last = table, n_stages - 1
        self.n_ranks = len(table.stages)
        self.store = {ACTIVATION: {}, GRADIENT: {}}
        self.slots = {ACTIVATION: table.activation_slots, GRADIENT: table.gradient_slots}
        # What owners keep, by place. All inputs are there; `leave` makes gradients of outputs.
        self.inputs = {place: ("x", int(m)) for place, m in enumerate(table.order)}
        self.outputs = {}
        self.done = []

    def read(self, payload, rank, chunk, microbatch):
        stage = self.table.stages[rank, chunk]
        found = self.store[payload][rank, chunk, microbatch % self.slots[payload]]
        assert found == (payload, microbatch, stage)
        return stage

    def compute(self, tick, rank):
        """Yields the messages of a rank: payload, and the mark that the receiver shall find."""
        for kind, payload, work, step in (
            ("F", ACTIVATION, self.table.forward, 1),
            ("B", GRADIENT, self.table.backward, -1),
        ):
            microbatch, chunk = (int(part[tick, rank]) for part in work)
            if microbatch == NONE:
                continue
            stage = self.read(ACTIVATION, rank, chunk, microbatch)
            if kind == "B":
                assert self.read(GRADIENT, rank, chunk, microbatch) == stage
            self.done.append((kind, microbatch, stage))
            yield payload, (payload, microbatch, stage + step)

    def owner_receives(self, tick, sent):
        for (payload, rank), places in self.table.to_owner.items():
            if (place := int(places[tick])) == NONE:
                continue
            microbatch = int(self.table.order[place])
            stage = self.last + 1 if payload == ACTIVATION else -1
            sent[rank].remove((payload, (payload, microbatch, stage)))
            if payload == ACTIVATION:
                self.outputs[place] = ("y", microbatch)
            else:
                assert self.inputs[place] == ("x", microbatch), "it has been read"
                self.inputs[place] = ("dx", microbatch)

    def owner_sends(self, tick):
        for (payload, rank), places in self.table.from_owner.items():
            if (place := int(places[tick])) == NONE:
                continue
            microbatch = int(self.table.order[place])
            kept, mark = (self.inputs, "x") if payload == ACTIVATION else (self.outputs, "dy")
            assert kept[place] == (mark, microbatch)
            stage = 0 if payload == ACTIVATION else self.last
            chunk = list(self.table.stages[rank]).index(stage)
            self.put(payload, rank, chunk, microbatch)

    def put(self, payload, rank, chunk, microbatch):
        stage = self.table.stages[rank, chunk]
        slot = microbatch % self.slots[payload]
        self.store[payload][rank, chunk, slot] = (payload, microbatch, stage)

    def tick(self, tick):
        sent = [list(self.compute(tick, rank)) for rank in range(self.n_ranks)]
        for (payload, shift), work in self.table.arrivals.items():
            for rank in range(self.n_ranks):
                microbatch, chunk = (int(part[tick, rank]) for part in work)
                if microbatch == NONE:
                    continue
                wanted = (payload, microbatch, self.table.stages[rank, chunk])
                sent[(rank - shift) % self.n_ranks].remove((payload, wanted))
                self.put(payload, rank, chunk, microbatch)
        self.owner_receives(tick, sent)
        assert not any(sent), "a message that nobody receives"
        if (number := int(self.table.leaves[tick])) != NONE:
            for place in range(number * self.n_ranks, (number + 1) * self.n_ranks):
                if place < len(self.table.order):
                    mark, microbatch = self.outputs[place]
                    assert mark == "y", "outputs leave once"
                    self.outputs[place] = ("dy", microbatch)
        self.owner_sends(tick)


def replay(schedule, table):
    machine = Replay(table, schedule.n_stages)
    for tick in range(len(table.leaves)):
        machine.tick(tick)
    assert {mark for mark, _ in machine.inputs.values()} == {"dx"}
    return machine.done


@pytest.mark.parametrize(("name", "stages", "microbatches"), CASES)
def test_ticks_compute_the_whole_step(name, stages, microbatches):
    schedule = schedules.build(name, stages, microbatches)
    done = replay(schedule, lockstep.lock_step(schedule))
    stages, all_of_them = range(stages), range(microbatches)
    wanted = [(kind, m, stage) for kind in "BF" for m in all_of_them for stage in stages]
    assert sorted(done) == wanted


@pytest.mark.parametrize(("name", "stages", "microbatches"), [("1f1b", 4, 8), ("dualpipe", 8, 20)])
def test_fewer_slots_mix_microbatches_up(name, stages, microbatches):
    schedule = schedules.build(name, stages, microbatches)
    table = lockstep.lock_step(schedule)
    with pytest.raises(AssertionError):
        replay(schedule, table._replace(activation_slots=table.activation_slots - 1))


def test_slots_do_not_grow_with_microbatches():
    for name, slots in [("1f1b", 23), ("interleaved", 11), ("dualpipe", 11), ("dualpipev", 11)]:
        for microbatches in (40, 80):
            table = lockstep.lock_step(schedules.build(name, 8, microbatches))
            assert (table.activation_slots, table.gradient_slots) == (slots, 1), name


def test_small_schedule_is_laid_out_tick_by_tick():
    table = lockstep.lock_step(schedules.build("1f1b", 2, 3))
    np.testing.assert_array_equal(table.stages, [[0], [1]])
    none = NONE
    np.testing.assert_array_equal(
        table.forward.microbatch,
        [[none, none], [0, none], [1, 0], [2, 1], [none, 2], *[[none, none]] * 3],
    )
    np.testing.assert_array_equal(
        table.backward.microbatch,
        [*[[none, none]] * 4, [none, 0], [0, 1], [1, 2], [2, none]],
    )
    arrived = table.arrivals[ACTIVATION, 1].microbatch
    np.testing.assert_array_equal(arrived[:4], [[none, none], [none, 0], [none, 1], [none, 2]])
    # Two outputs make a group of the two owners, the third is left.
    np.testing.assert_array_equal(table.leaves, [none, none, none, 0, 1, none, none, none])
    np.testing.assert_array_equal(table.from_owner[ACTIVATION, 0][:4], [0, 1, 2, none])
    np.testing.assert_array_equal(table.from_owner[GRADIENT, 1][3:7], [0, 1, 2, none])
    np.testing.assert_array_equal(table.to_owner[ACTIVATION, 1][2:6], [0, 1, 2, none])
    np.testing.assert_array_equal(table.to_owner[GRADIENT, 0][4:], [none, 0, 1, 2])
    assert all(part.dtype == np.int32 for part in (table.stages, *table.forward, arrived))


@pytest.mark.parametrize("name", ["gpipe", "zb1p"])
def test_schedules_that_differ_in_order_alone_run_as_1f1b(name):
    ours, other = (lockstep.lock_step(schedules.build(n, 4, 9)) for n in (name, "1f1b"))
    for field in ("forward", "backward", "order", "leaves"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(other, field))


@pytest.mark.parametrize(
    ("name", "stages", "channels"),
    [
        ("1f1b", 1, []),
        ("1f1b", 4, [(ACTIVATION, 1), (GRADIENT, -1)]),
        ("interleaved", 8, [(ACTIVATION, 1), (GRADIENT, -1)]),
        ("interleaved", 4, [(ACTIVATION, 1), (GRADIENT, 1)]),
        ("dualpipe", 4, [(ACTIVATION, -1), (ACTIVATION, 1), (GRADIENT, -1), (GRADIENT, 1)]),
        ("dualpipev", 2, [(ACTIVATION, 0), (GRADIENT, 0)]),
    ],
)
def test_only_used_channels_are_there(name, stages, channels):
    table = lockstep.lock_step(schedules.build(name, stages, 8))
    assert list(table.arrivals) == channels


def test_ranks_in_step_wait_for_nobody_in_the_steady_state():
    """All but the bubble, one way through the pipe and back, is work of every rank."""
    for stages, microbatches in [(4, 16), (8, 40), (16, 128)]:
        for name, chunks, hops in [
            ("1f1b", 1, stages - 1),
            ("interleaved", 2, stages // 2 - 1),
            ("dualpipe", 1, stages - 2),
        ]:
            schedule = schedules.build(name, stages, microbatches)
            assert lockstep.makespan(schedule) == 3 * (microbatches * chunks + hops), name


def test_overlapped_pairs_take_their_own_time():
    schedule = schedules.build("dualpipe", 4, 16)
    gain = lockstep.makespan(schedule) - lockstep.makespan(schedule, Costs(overlapped=2.0))
    table = lockstep.lock_step(schedule)
    pairs = [(work.microbatch != NONE).any(axis=1) for work in (table.forward, table.backward)]
    assert gain == np.logical_and(*pairs).sum()
    plain = schedules.build("1f1b", 4, 16)
    assert lockstep.makespan(plain) == lockstep.makespan(plain, Costs(overlapped=2.0))


def test_deadlock_is_refused():
    schedule = schedules.build("dualpipe", 2, 4)
    # The second rank takes the stream that enters at its own end last, the first rank first.
    orders = (schedule.orders[0], tuple(reversed(schedule.orders[1])))
    with pytest.raises(ValueError, match="dualpipe: deadlock; waiting are"):
        lockstep.lock_step(dataclasses.replace(schedule, orders=orders))
