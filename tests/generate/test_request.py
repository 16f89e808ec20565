"""Outputs of a request: why it ends, and all of them as one."""

import dataclasses

import numpy as np

from dsjax.generate.record import Record
from dsjax.generate.request import Given, Output, Request, join, output, problems
from tests.model.tiny import TINY

PLAIN = dataclasses.replace(TINY, n_mtp=0)
DENSE = dataclasses.replace(TINY, n_layers=1, n_dense_layers=1)


def test_output_says_why_a_request_ends():
    request = Request((1,), 4, stop_ids=frozenset({9}))
    assert output(request, [9, 3], left=2, report=Record()).finish is None
    assert output(request, [3, 9], left=0, report=Record()).finish == "stop"
    assert output(request, [9, 3], left=0, report=Record()).finish == "length"
    assert output(request, [], left=0, report=Record()).finish == "length"


def test_output_holds_what_its_request_asks_for():
    """The batch's report has what any of its requests asks for."""
    numbers = np.zeros(1)
    report = Record(numbers, numbers, np.zeros((1, 2, 3)))
    assert output(Request((1,), 1), [3], left=0, report=report) == Output([3], "length")
    both = Request((1,), 1, logprobs=True, experts=True)
    given = output(both, [3], left=0, report=report).report
    assert [name for name, array in given._asdict().items() if array is not None] == [
        "logprobs", "sampled_logprobs", "experts",
    ]  # fmt: skip
    found = output(Request((1,), 1, experts=True), [3], left=0, report=report).report
    assert found.logprobs is found.sampled_logprobs is None and found.experts.shape == (1, 2, 3)


def test_joined_outputs_are_the_whole_reply():
    first = Record(np.array([1.0]), np.array([2.0]), np.zeros((3, 1, 2)))
    second = Record(np.array([3.0, 4.0]), np.array([5.0, 6.0]), np.ones((2, 1, 2)))
    whole = join([Output([5], None, first), Output([6, 7], "stop", second)])
    assert (whole.tokens, whole.finish) == ([5, 6, 7], "stop")
    assert whole.report.logprobs.tolist() == [1, 3, 4]
    assert whole.report.sampled_logprobs.tolist() == [2, 5, 6]
    assert whole.report.experts[:, 0, 0].tolist() == [0, 0, 0, 1, 1]
    assert join([Output([5]), Output([6], "length")]) == Output([5, 6], "length")


def test_a_model_without_experts_cannot_report_them():
    asked = Request((1,), 1, experts=True)
    assert list(problems(asked, DENSE)) == ["experts=True, and the model has none; leave it out"]
    assert not list(problems(asked, TINY))


def given(places, shape):
    return Request((1, 2, 3), 1, given=Given(np.array(places), np.zeros(shape, np.float32)))


def test_what_is_given_fits_prompt_and_model():
    assert not list(problems(given([0, 2], (2, 32)), PLAIN))
    (wrong,) = problems(given([0, 2], (2, 16)), PLAIN)
    assert "shape [2, 16] are given for [2, 32]: 2 tokens of a model with model.dim=32" in wrong
    (outside,) = problems(given([0, 3], (2, 32)), PLAIN)
    assert "outside the prompt of 3" in outside
    (mtp,) = problems(given([0], (1, 32)), TINY)
    assert "set model.n_mtp=0" in mtp


def test_scope_tells_owners_and_pictures_apart():
    one, same = given([0], (1, 32)), given([0], (1, 32))
    moved = given([1], (1, 32))
    assert one.scope == same.scope != moved.scope
    assert one.scope != dataclasses.replace(one, owner="a").scope
    assert Request((1,), 1, owner="a").scope == "a"
