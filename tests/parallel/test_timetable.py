"""Schedules are timed by what operations need, and wrong ones are refused."""

import dataclasses

import pytest

from dsjax.parallel import schedules, timetable
from dsjax.parallel.timetable import Costs, Op, Schedule


def two_stages(*orders):
    """A schedule of one micro-batch on two ranks."""
    return Schedule("drawn", ((0, 1),), orders)


F0, F1, B0, B1 = (Op(kind, 0, stage) for kind in "FB" for stage in (0, 1))
I0, I1, W0, W1 = (Op(kind, 0, stage) for kind in "IW" for stage in (0, 1))
GOOD = two_stages(((F0,), (B0,)), ((F1,), (I1,), (W1,)))


def changed(schedule, rank, slots):
    orders = list(schedule.orders)
    orders[rank] = tuple(slots)
    return dataclasses.replace(schedule, orders=tuple(orders))


def test_slots_start_once_their_rank_and_their_needs_are_done():
    timing = timetable.simulate(GOOD, Costs(forward=3, backward=5, weights=1))
    assert timing.starts == ((0, 10), (3, 6, 10))
    assert timing.ends == ((3, 15), (6, 10, 11))
    assert timing.makespan == 15 and timing.busy == (8, 8) and timing.bubble == (7, 7)
    assert timing.bubble_share == pytest.approx(7 / 15)


def test_backward_waits_for_whole_backward_of_next_stage():
    timing = timetable.simulate(two_stages(((F0,), (B0,)), ((F1,), (B1,))))
    assert timing.starts == ((0, 4), (1, 2))


def test_overlapped_pair_takes_its_own_time():
    schedule = Schedule("pair", ((0,), (0,)), (((F0,), (Op("F", 1, 0), B0), (Op("B", 1, 0),)),))
    timetable.check(schedule)
    assert timetable.simulate(schedule, Costs(overlapped=2.25)).ends == ((1, 3.25, 5.25),)


def test_weight_gradients_keep_what_input_gradients_let_go():
    order = (F0, Op("F", 1, 0), I0, Op("F", 2, 0), Op("I", 1, 0), Op("F", 3, 0))
    order += (Op("I", 2, 0), Op("I", 3, 0), *(Op("W", m, 0) for m in range(4)))
    timing = timetable.simulate(Schedule("kept", ((0,),) * 4, (tuple((op,) for op in order),)))
    assert timing.live == (2,) and timing.kept == (4,)


def test_pair_holds_forward_and_backward_at_once():
    schedule = Schedule("pair", ((0,), (0,)), (((F0,), (Op("F", 1, 0), B0), (Op("B", 1, 0),)),))
    assert timetable.simulate(schedule).live == (2,)


def test_chunks_are_numbered_as_microbatches_meet_them():
    assert schedules.build("dualpipe", 4, 8).held() == ((0, 3), (1, 2), (2, 1), (3, 0))
    assert schedules.build("dualpipev", 4, 4).held() == ((0, 3), (1, 2))
    assert schedules.interleaved(6, 2, 3).held() == ((0, 2, 4), (1, 3, 5))


def test_check_accepts_a_whole_step():
    timetable.check(GOOD)


@pytest.mark.parametrize(
    ("rank", "order", "message"),
    [
        (0, [(F0,)], r"micro-batch 0, stage 0 has \['F'\]; it needs one F and either one B or"),
        (0, [(F0,), (F0,), (B0,)], r"stage 0 has \['B', 'F', 'F'\]"),
        (1, [(F1,), (I1,)], r"stage 1 has \['F', 'I'\]"),
        (1, [(F1,), (B1,), (I1,), (W1,)], r"stage 1 has \['B', 'F', 'I', 'W'\]"),
        (0, [(F0,), (B0, W0)], r"rank 0, slot 1 holds \['B', 'W'\]; only one operation"),
        (
            0,
            [(F0,), (B0,), (F1,)],
            r"rank 0 does F\(micro-batch 0, stage 1\), .*gs to rank 1",
        ),
        (0, [(F0,), (Op("B", 1, 0),)], r"slot 1: B\(micro-batch 1, stage 0\) does not exist"),
        (
            0,
            [(F0, B0)],
            r"deadlock; waiting are rank 0 with F.* & B.* for F\(micro-batch 0, stage 0",
        ),
        (1, [(F1,), (W1,), (I1,)], r"deadlock.* rank 1 with W.* for I\(micro-batch 0, stage 1\)"),
        (0, [(B0,), (F0,)], r"rank 0 with B.* for F.*, stage 0\), I.*, stage 1\); rank 1 with F"),
    ],
    ids=["no-B", "2-F", "no-W", "B-and-I", "pair", "rank", "range", "own-pair", "W-I", "B-F"],
)
def test_check_refuses(rank, order, message):
    with pytest.raises(ValueError, match=message):
        timetable.check(changed(GOOD, rank, order))


def test_check_lists_all_that_is_wrong():
    wrong = changed(changed(GOOD, 0, [(F0,)]), 1, [(F1,), (I1,)])
    with pytest.raises(ValueError, match=r"(?s)'drawn' is wrong:.*stage 0 has.*stage 1 has"):
        timetable.check(wrong)


def test_swapped_forwards_deadlock():
    good = schedules.build("1f1b", 2, 4)
    first, second, *rest = good.orders[1]
    with pytest.raises(ValueError, match=r"1f1b: deadlock; waiting are rank 0 .*; rank 1 with B"):
        timetable.simulate(changed(good, 1, [second, first, *rest]))
