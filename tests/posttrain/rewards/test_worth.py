"""What rules return, read as verdicts."""

import pytest

from dsjax.posttrain.rewards.worth import Worth, read


@pytest.mark.parametrize(
    ("returned", "worth"),
    [
        (None, Worth(None)),
        (1, Worth(1.0)),
        (True, Worth(1.0)),
        ([[3, 1], [8, 0.5]], Worth(0.75, ((3, 1.0), (8, 0.5)))),
        ([], Worth(None)),
    ],
)
def test_numbers_and_steps_are_read(returned, worth):
    assert read(returned, 8) == worth


@pytest.mark.parametrize("returned", ["1", [1, 2], [[3, "1"]], [[3.0, 1]], [[3, 1, 2]], {"a": 1}])
def test_what_is_no_verdict_is_refused(returned):
    with pytest.raises(ValueError, match="not a number, None, or a list of steps"):
        read(returned, 8)


@pytest.mark.parametrize("ends", [[0], [9], [5, 3], [4, 4], [-1, 3]])
def test_steps_must_follow_one_another_within_the_completion(ends):
    with pytest.raises(ValueError, match=r"ends must increase, from 1 to 8 at most"):
        read([[end, 1.0] for end in ends], 8)
