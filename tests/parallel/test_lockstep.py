"""The arrays are enough to run a step: a machine that knows nothing else replays them."""

import numpy as np
import pytest

from dsjax.parallel import lockstep, schedules, timetable
from dsjax.parallel.lockstep import ACTIVATION, FULL, GRADIENT, IDLE, INPUT, NONE, WEIGHTS

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
        self.done = []

    def read(self, payload, rank, chunk, microbatch):
        stage = self.table.stages[rank, chunk]
        if stage != (0 if payload == ACTIVATION else self.last):
            found = self.store[payload][rank, chunk, microbatch % self.slots[payload]]
            assert found == (payload, microbatch, stage)
        return stage

    def compute(self, tick, rank):
        """Yields the messages of a rank: payload, and the mark that the receiver shall find."""
        microbatch, chunk = (int(part[tick, rank]) for part in self.table.forward)
        if microbatch != NONE:
            stage = self.read(ACTIVATION, rank, chunk, microbatch)
            self.done.append(("F", microbatch, stage))
            if stage < self.last:
                yield ACTIVATION, (ACTIVATION, microbatch, stage + 1)
        microbatch, chunk = (int(part[tick, rank]) for part in self.table.backward)
        kind = self.table.backward_kind[tick, rank]
        assert (kind == IDLE) == (microbatch == NONE)
        if microbatch != NONE:
            stage = self.read(ACTIVATION, rank, chunk, microbatch)
            assert self.read(GRADIENT, rank, chunk, microbatch) == stage
            self.done.append(({FULL: "B", INPUT: "I", WEIGHTS: "W"}[kind], microbatch, stage))
            if kind != WEIGHTS and stage > 0:
                yield GRADIENT, (GRADIENT, microbatch, stage - 1)

    def tick(self, tick):
        sent = [list(self.compute(tick, rank)) for rank in range(self.n_ranks)]
        for (payload, shift), work in self.table.arrivals.items():
            for rank in range(self.n_ranks):
                microbatch, chunk = (int(part[tick, rank]) for part in work)
                if microbatch == NONE:
                    continue
                wanted = (payload, microbatch, self.table.stages[rank, chunk])
                messages = sent[(rank - shift) % self.n_ranks]
                messages.remove((payload, wanted))
                self.store[payload][rank, chunk, microbatch % self.slots[payload]] = wanted
        assert not any(sent), "a message that nobody receives"


def replay(schedule, table):
    machine = Replay(table, schedule.n_stages)
    for tick in range(table.n_ticks):
        machine.tick(tick)
    return machine.done


@pytest.mark.parametrize(("name", "stages", "microbatches"), CASES)
def test_ticks_compute_the_whole_step(name, stages, microbatches):
    schedule = schedules.build(name, stages, microbatches)
    done = replay(schedule, lockstep.lock_step(schedule))
    wanted = [tuple(op) for order in schedule.orders for slot in order for op in slot]
    assert sorted(done) == sorted(wanted)


@pytest.mark.parametrize("payload", [ACTIVATION, GRADIENT])
@pytest.mark.parametrize(("name", "stages", "microbatches"), [("1f1b", 4, 8), ("dualpipe", 8, 20)])
def test_fewer_slots_mix_microbatches_up(name, stages, microbatches, payload):
    schedule = schedules.build(name, stages, microbatches)
    table = lockstep.lock_step(schedule)
    field = f"{payload}_slots"
    fewer = table._replace(**{field: max(getattr(table, field) - 1, 1)})
    if getattr(table, field) > 1:
        with pytest.raises(AssertionError):
            replay(schedule, fewer)


def test_slots_do_not_grow_with_microbatches():
    for name, activations, gradients in [
        ("1f1b", 8, 1),
        ("interleaved", 8, 2),
        ("zb1p", 8, 8),
        ("dualpipe", 7, 2),
        ("dualpipev", 7, 2),
    ]:
        for microbatches in (20, 40):
            table = lockstep.lock_step(schedules.build(name, 8, microbatches))
            assert (table.activation_slots, table.gradient_slots) == (activations, gradients), name


def test_small_schedule_is_laid_out_tick_by_tick():
    table = lockstep.lock_step(schedules.build("gpipe", 2, 2))
    np.testing.assert_array_equal(table.stages, [[0], [1]])
    none = NONE
    np.testing.assert_array_equal(
        table.forward.microbatch,
        [[0, none], [1, 0], [none, 1], [none, none], [none, none], [none, none]],
    )
    np.testing.assert_array_equal(
        table.backward_kind,
        [[IDLE, IDLE], [IDLE, IDLE], [IDLE, IDLE], [IDLE, FULL], [FULL, FULL], [FULL, IDLE]],
    )
    arrived = table.arrivals[ACTIVATION, 1].microbatch
    np.testing.assert_array_equal(arrived[:3], [[none, 0], [none, 1], [none, none]])
    assert all(part.dtype == np.int32 for part in (table.stages, *table.forward, arrived))


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


def test_running_in_step_costs_what_the_slowest_costs():
    # in a tick of 1F1B some rank does a backward, so the others wait for it
    schedule = schedules.build("1f1b", 2, 3)
    assert timetable.simulate(schedule).makespan == 12
    assert lockstep.makespan(schedule) == 1 + 1 + 2 * 6
    even = schedules.build("zb1p", 4, 8)
    assert lockstep.makespan(even) == timetable.simulate(even).makespan == 27


def test_deadlock_is_refused():
    schedule = schedules.build("1f1b", 2, 2)
    backwards = timetable.Schedule("1f1b", schedule.routes, tuple(o[::-1] for o in schedule.orders))
    with pytest.raises(ValueError, match="deadlock"):
        lockstep.lock_step(backwards)
