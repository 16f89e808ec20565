"""Every schedule is whole and free of deadlock, and its bubble and peaks are the published ones."""

from collections import defaultdict

import pytest

from dsjax.parallel import schedules, timetable
from dsjax.parallel.timetable import Costs

SIZES = {
    "gpipe": [(1, 1), (2, 1), (3, 7), (4, 8), (8, 3)],
    "1f1b": [(1, 1), (2, 1), (3, 7), (4, 8), (8, 3), (8, 20)],
    "interleaved": [(2, 1), (2, 5), (4, 2), (8, 4), (8, 8), (8, 20), (6, 9)],
    "zb1p": [(1, 1), (2, 2), (3, 7), (4, 4), (8, 8), (8, 20)],
    "dualpipe": [(2, 4), (2, 6), (4, 8), (4, 16), (6, 12), (8, 16), (8, 20), (16, 32)],
    "dualpipev": [(2, 2), (2, 3), (4, 4), (4, 9), (6, 7), (8, 8), (8, 10), (16, 16)],
}
CASES = [(name, *size) for name, sizes in SIZES.items() for size in sizes]


def test_every_schedule_has_cases():
    assert tuple(SIZES) == schedules.NAMES


@pytest.mark.parametrize(("name", "stages", "microbatches"), CASES)
def test_schedule_is_whole_and_as_published(name, stages, microbatches):
    schedule = schedules.build(name, stages, microbatches)
    timetable.check(schedule)
    assert (schedule.name, schedule.n_stages) == (name, stages)
    assert schedule.n_microbatches == microbatches
    ranks = stages // 2 if name in ("interleaved", "dualpipev") else stages
    assert schedule.n_ranks == ranks
    timing, expected = timetable.simulate(schedule), schedules.expected(schedule)
    assert set(timing.bubble) == {expected.bubble}
    assert max(timing.live) == expected.live
    assert {len(stages) for stages in schedule.held()} == {expected.parameters}


@pytest.mark.parametrize(
    ("name", "bubbles"),
    [
        ("gpipe", {4: 9, 8: 21}),
        ("1f1b", {4: 9, 8: 21}),
        ("interleaved", {4: 3, 8: 9}),
        ("zb1p", {4: 3, 8: 7}),
        ("dualpipe", {4: 2, 8: 6}),
        ("dualpipev", {4: 2, 8: 6}),
    ],
)
def test_bubble_does_not_depend_on_microbatches(name, bubbles):
    for stages, bubble in bubbles.items():
        for microbatches in (2 * stages, 3 * stages, 4 * stages):
            timing = timetable.simulate(schedules.build(name, stages, microbatches))
            assert set(timing.bubble) == {bubble}


def test_interleaved_divides_the_bubble_by_its_chunks():
    for chunks in (1, 2, 3, 4):
        schedule = schedules.interleaved(4 * chunks, 8, chunks)
        timetable.check(schedule)
        assert set(timetable.simulate(schedule).bubble) == {9}  # of a run `chunks` times as long
        assert max(timetable.simulate(schedule).live) == 7 + (chunks - 1) * 4


def test_interleaved_of_one_chunk_is_1f1b_with_twice_the_warmup():
    one, plain = schedules.interleaved(4, 8, 1), schedules.build("1f1b", 4, 8)
    assert one.routes == plain.routes
    assert timetable.simulate(one).live == (7, 5, 3, 1)
    assert timetable.simulate(plain).live == (4, 3, 2, 1)


def test_zb1p_keeps_as_much_on_every_rank_as_1f1b_on_its_first():
    timing = timetable.simulate(schedules.build("zb1p", 8, 20))
    assert timing.live == (8, 7, 6, 5, 4, 3, 2, 1) and timing.kept == (8,) * 8


def test_zb1p_with_few_microbatches_has_no_published_bubble():
    schedule = schedules.build("zb1p", 4, 2)
    timetable.check(schedule)
    assert schedules.expected(schedule).bubble is None
    assert set(timetable.simulate(schedule).bubble) == {5}  # the formula says 3


def test_dualpipe_of_the_report_takes_54():
    timing = timetable.simulate(schedules.build("dualpipe", 8, 16))
    assert timing.makespan == 54 and timing.live == timing.kept == (9,) * 8


def test_dualpipev_is_the_first_half_of_dualpipe():
    whole, half = schedules.build("dualpipe", 8, 20), schedules.build("dualpipev", 8, 10)
    for rank in range(4):
        folded = tuple(
            tuple(op._replace(microbatch=op.microbatch % 10) for op in slot)
            for slot in whole.orders[rank]
        )
        assert folded == half.orders[rank]


def test_dualpipe_gains_from_overlap_everywhere():
    costs = Costs(overlapped=2.5)
    timing = timetable.simulate(schedules.build("dualpipe", 8, 16), costs)
    # the formula's 4.5 in the middle; the outer ranks have fewer pairs to gain from
    assert timing.bubble == (3.5, 4.0, 4.5, 4.5, 4.5, 4.5, 4.0, 3.5)


def test_dualpipe_formula_bounds_uneven_halves_of_the_backward():
    costs = Costs(backward=2.2, weights=0.9)
    schedule = schedules.build("dualpipe", 8, 16)
    assert schedules.expected(schedule, costs).bubble == pytest.approx(7.5)
    assert max(timetable.simulate(schedule, costs).bubble) == pytest.approx(6.6)


def test_dualpipe_pairs_all_but_the_ends():
    order = schedules.build("dualpipe", 8, 20).orders
    pairs = [sum(len(slot) == 2 for slot in order[rank]) for rank in range(8)]
    # step 4: two a turn, less one in the middle; step 5: one a turn
    assert pairs == [9, 10, 11, 11, 11, 11, 10, 9]


@pytest.mark.parametrize(("name", "stages", "microbatches"), CASES)
def test_weight_gradients_come_in_the_order_of_microbatches(name, stages, microbatches):
    made = defaultdict(list)
    for rank, order in enumerate(schedules.build(name, stages, microbatches).orders):
        for slot in order:
            for op in slot:
                if op.kind in "BW":
                    made[rank, op.stage].append(op.microbatch)
    assert made and all(found == sorted(found) for found in made.values())


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "message"),
    [
        (
            "dualpipe",
            3,
            12,
            "even number of stages.*stages=3,.* for 4 stages, microbatches 8, 10, 12",
        ),
        (
            "dualpipe",
            4,
            9,
            "even number of micro-batches.*microbatches=9; .* microbatches 8, 10, 12",
        ),
        ("dualpipe", 4, 6, "at least 2 x stages; .* microbatches=6; .* microbatches 8, 10, 12"),
        ("dualpipev", 5, 12, "even number of stages.*stages=5,.* for 6 stages, microbatches 6, 7"),
        ("dualpipev", 4, 3, "at least as many micro-batches; .* microbatches=3; .* 4, 5, 6"),
        ("interleaved", 5, 4, "over the 2 chunks per rank.* stages=5,.*; use stages 2, 4, 6"),
        ("interleaved", 8, 6, "over the ranks .* microbatches=6; .* microbatches 4, 8, 12"),
        ("gpipe", 0, 4, "gpipe: stages=0 must be 1, 2, 3"),
        ("1f1b", 4, 0, "1f1b: microbatches=0 must be 1, 2, 3"),
        ("zb1p", -1, 4, "zb1p: stages=-1 must be"),
        ("dualpipe", 0, 0, "dualpipe: stages=0 must be"),
        ("dualpipev", 4, -4, "dualpipev: microbatches=-4 must be"),
        ("dualpip", 4, 8, "no schedule 'dualpip', only gpipe, 1f1b, .*; did you mean dualpipe"),
        ("", 4, 8, "no schedule '', only gpipe, .*dualpipev$"),
    ],
)
def test_build_refuses(name, stages, microbatches, message):
    with pytest.raises(ValueError, match=message):
        schedules.build(name, stages, microbatches)


def test_interleaved_refuses_no_chunks():
    with pytest.raises(ValueError, match=r"interleaved: chunks=0 must be 1, 2, 3"):
        schedules.interleaved(4, 4, 0)


def test_expected_knows_only_what_is_built_here():
    drawn = timetable.Schedule("drawn", ((0,),), (((timetable.Op("F", 0, 0),),),))
    with pytest.raises(ValueError, match="nothing is published about a schedule 'drawn'"):
        schedules.expected(drawn)
