"""Choices by hash."""

import pytest

from dsjax.curate import sampling


def findings(order, samples=3):
    found = sampling.Findings(samples, seed=0)
    for number in order:
        row = {"id": f"d{number}", "source": "s", "text": f"text {number}" + "x" * 2000}
        found.add(row, "words" if number % 5 == 0 else "kept", 10)
    return found


def test_order_does_not_matter():
    one, other = findings(range(50)), findings(reversed(range(50)))
    assert one.samples() == other.samples() and one.counts == other.counts
    assert one.counts == {"s": {"kept": [40, 400], "words": [10, 100]}}


@pytest.mark.parametrize("samples", [0, 1, 100])
def test_the_lowest_are_kept(samples):
    (source, verdict, found), _ = findings(range(50), samples).samples()
    ranked = sorted((sampling.position(f"d{n}", 0), f"d{n}") for n in range(50) if n % 5)
    assert (source, verdict) == ("s", "kept")
    assert [(place, name) for place, name, _ in found] == ranked[:samples]
    assert all(len(text) == sampling.CHARACTERS for *_, text in found)


def test_positions_spread_and_depend_on_the_seed():
    places = [sampling.position(f"d{n}", 0) for n in range(1000)]
    assert 400 < sum(place < sampling.WHOLE // 2 for place in places) < 600
    assert sampling.position("d", 0) != sampling.position("d", 1)
