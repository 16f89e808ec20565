"""Measures of solved problems, against closed forms and exhaustive counts."""

import itertools
import math
import random

import numpy as np
import pytest

from dsjax.posttrain.evaluation import (
    Examination,
    Sample,
    majority,
    measure,
    pass_at_k,
    run,
    summarise,
)
from tests.posttrain import toy

SAME = dict(tokens=1, ended=True)


def sample(answer, worth):
    return Sample(worth, answer, **SAME)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (10, 3, 5, 0.916666667),
        (16, 1, 8, 0.5),
        (64, 5, 16, 0.775421168),
        (4, 0, 2, 0),
        (4, 4, 1, 1),
    ],
)
def test_pass_at_k_is_the_published_estimate(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-9)


def test_pass_at_k_counts_the_subsets():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_more_samples_than_there_are(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples .* there are 4"):
        pass_at_k(4, 1, k)


def test_majority_takes_the_commonest_answer_and_the_first_of_equals():
    assert majority([sample("a", 1), sample("b", 0), sample("b", 0)]) is False
    assert majority([sample("a", 1), sample("b", 0)]) is True
    assert majority([sample("b", 0), sample("a", 1)]) is False
    assert majority([sample(None, 0), sample(None, 0), sample("a", 1)]) is True
    assert majority([sample(None, 1)]) is None
    assert majority([]) is None


def test_wilson_interval_of_shares():
    """Newcombe, Stat. Med. 17 (1998), table I: 81 of 263, and 15 of 148."""
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        found = measure([1.0] * right + [0.0] * (count - right))
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
        assert found.interval == "wilson" and found.value == right / count
    for count in range(1, 200):  # rounding would move the end of some of them
        none, all_ = measure([0.0] * count), measure([1.0] * count)
        assert none.low == 0 < none.high < 1 and all_.high == 1 > all_.low > 0


def test_bootstrap_interval_is_that_of_the_mean():
    random.seed(0)
    values = [random.random() for _ in range(400)]
    found = measure(values)
    half = 1.96 * float(np.std(values)) / math.sqrt(len(values))
    assert found.interval == "bootstrap" and found == measure(values)
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_summary_holds_every_measure():
    samples = [
        [sample("a", 1.0), sample("b", 0.1), sample("b", 0.0), sample("b", 0.0)],
        [sample("c", 1.0), sample("c", 1.0), sample(None, 0.0), sample("d", 0.0)],
    ]
    found = summarise(samples, [2, 4], [samples[0][1], samples[1][0]])
    values = {name: each.value for name, each in found.items()}
    assert values == pytest.approx({
        "pass@1": (0.25 + 0.5) / 2,
        "pass@2": (pass_at_k(4, 1, 2) + pass_at_k(4, 2, 2)) / 2,
        "pass@4": 1.0,
        "maj@2": 1.0,  # of two different answers the first counts
        "maj@4": 0.5,
        "greedy": 0.5,
    })  # fmt: skip


def test_samples_that_cannot_be_judged_are_left_out():
    samples = [[sample("a", 1.0), sample("b", None)], [sample("c", None)] * 2]
    found = summarise(samples, [2])
    assert found["pass@1"].value == 1.0 and not {"pass@2", "maj@2"} & found.keys()
    samples = [[sample("b", None), sample("a", 1.0), sample("a", 1.0)], [sample("c", None)] * 3]
    assert summarise(samples, [2])["maj@2"].value == 1.0


def test_programs_have_no_majority():
    assert set(summarise([[sample(None, 1.0)] * 2], [2])) == {"pass@1", "pass@2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "maths"}, r"there is no reward 'maths'; did you mean math\?"),
        ({"reward": "format"}, "gone"),
        ({"n": 2, "k": [4]}, "--k 4 needs as many samples: raise --n 2"),
        ({"problems": "gone.jsonl"}, "--problems='gone.jsonl' matches no file"),
        ({"json": "gone/e.json"}, "e.json cannot be written: there is no folder gone; make it"),
    ],
)
def test_bad_input_is_refused_before_the_weights_are_read(tmp_path, changes, message):
    problems = toy.write_lines(tmp_path / "p.jsonl", [{"prompt": "q", "answer": "1"}])
    values = dict(
        checkpoint=tmp_path / "gone", problems=str(problems), reward="format", n=4, k=None,
        max_new_tokens=None, temperature=None, top_p=None, seed=0, max_batch=4, system="",
        template="", raw=False, json=None, dtype=None, mesh={}, override=[],
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        run(Examination(**values | changes))
