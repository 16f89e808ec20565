"""Advantages against hand-computed groups, and the properties that training relies on."""

import numpy as np
import pytest

from dsjax.posttrain.advantages import outcome_advantages, process_advantages, token_weights

SCALES = ("population", "sample", "none")


@pytest.mark.parametrize(
    ("rewards", "scale", "wanted"),
    [
        ([1, 0, 0], "population", [1.414213562, -0.707106781, -0.707106781]),
        ([2, 1, 2], "population", [0.707106781, -1.414213562, 0.707106781]),
        ([1, 0, 0], "sample", [1.154500573, -0.577250287, -0.577250287]),
        ([1, 0, 0], "none", [2 / 3, -1 / 3, -1 / 3]),
        ([2, 1, 2], "none", [1 / 3, -2 / 3, 1 / 3]),
        ([1, 0, 0, 0], "population", [1.732050808, -0.577350269, -0.577350269, -0.577350269]),
        ([1, 0, 0, 0], "sample", [1.49970006, -0.49990002, -0.49990002, -0.49990002]),
        ([1e-9, 0, 0, 0], "population", [1.732050808, -0.577350269, -0.577350269, -0.577350269]),
        ([1e-9, 0, 0, 0], "sample", [7.49996e-6, -2.49999e-6, -2.49999e-6, -2.49999e-6]),
    ],
)
def test_outcome_advantages_of_known_groups(rewards, scale, wanted):
    np.testing.assert_allclose(outcome_advantages([rewards], scale)[0], wanted, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e30, -7.3])
def test_group_of_equal_rewards_has_exactly_no_advantage(scale, reward):
    # The mean of seven times 0.1 is not 0.1: subtracting would leave a rest to be magnified.
    assert not outcome_advantages([[reward] * 7], scale).any()


@pytest.mark.parametrize("scale", SCALES)
def test_output_without_verdict_is_left_out_of_its_group(scale):
    nan = float("nan")
    both = outcome_advantages([[1.0, nan, 0.0, 0.0], [nan, nan, nan, nan]], scale)
    assert both[0, 1] == 0 and not both[1].any()
    np.testing.assert_array_equal(both[0, [0, 2, 3]], outcome_advantages([[1, 0, 0]], scale)[0])


def test_groups_do_not_influence_one_another():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 4))
    each = np.concatenate([outcome_advantages(row[None]) for row in rewards])
    np.testing.assert_array_equal(outcome_advantages(rewards), each)
    np.testing.assert_allclose(outcome_advantages(rewards * 3 + 100), each, atol=1e-11)


def test_process_advantages_sum_the_steps_still_to_end():
    first, second = process_advantages([(0.5, 1), (0.2, 0.6, 0)], [(2, 4), (1, 3, 5)], (5, 6))
    np.testing.assert_allclose(first, [1.685590762] * 3 + [1.569343123] * 2, atol=1e-9)
    np.testing.assert_allclose(
        second, [-1.685590762] * 2 + [-0.92998111] * 2 + [-1.336847846] * 2, atol=1e-8
    )


def test_process_advantages_of_one_step_at_the_end_are_outcome_advantages():
    rewards = [1.0, 0.0, 2.0]
    per_token = process_advantages([[r] for r in rewards], [[3]] * 3, [4] * 3)
    outcome = outcome_advantages([rewards])[0]
    np.testing.assert_array_equal(per_token, np.repeat(outcome[:, None], 4, axis=1))
    assert not np.concatenate(process_advantages([[0.1]] * 3, [[3]] * 3, [4] * 3)).any()


@pytest.mark.parametrize(("rewards", "ends"), [([[1.0, 2.0]], [[1]]), ([[1.0]], [[4]])])
def test_process_advantages_refuse_steps_outside_the_output(rewards, ends):
    with pytest.raises(ValueError, match="output 0 of 4 tokens"):
        process_advantages(rewards, ends, [4])


@pytest.mark.parametrize(
    ("average", "longest", "wanted"),
    [
        ("sequence", None, [1 / 6, 1 / 12, 1 / 3]),
        ("token", None, [1 / 7] * 3),
        ("constant", 10, [1 / 30] * 3),
    ],
)
def test_token_weights(average, longest, wanted):
    np.testing.assert_allclose(token_weights([2, 4, 1], average, longest), wanted, rtol=1e-15)


def test_constant_average_needs_its_longest():
    with pytest.raises(ValueError, match="longest=None"):
        token_weights([1, 2], "constant")


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_no_outputs_have_no_weights(average):
    assert token_weights([], average, 8).shape == (0,)
