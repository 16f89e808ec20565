"""Thought, answer and box of a reply."""

import pytest

from dsjax.posttrain import answer


@pytest.mark.parametrize(
    ("completion", "problem", "expected"),
    [
        ("<think>a</think>b", {}, "b"),
        ("a</think>b", {"opened": True}, "b"),
        ("a</think>b</think>c", {}, "c"),
        ("b", {}, "b"),
        ("b", {"opened": False}, "b"),
        ("never ends", {"opened": True}, None),
        ("never ends", {"prompt": "Q\n<think>\n"}, None),
        ("<think>never ends", {}, None),
        ("<think>a</think>b<think>again", {}, None),
        ("b", {"prompt": "Q"}, "b"),
        ("<think>a</think>", {}, ""),
    ],
)
def test_answer_is_what_follows_the_thought(completion, problem, expected):
    assert answer.split(completion, problem)[1] == expected


@pytest.mark.parametrize("completion", ["<think>a b</think>c", "a b</think>c", "<think>a b"])
def test_thought_is_what_precedes_the_answer(completion):
    assert answer.split(completion, {"opened": not completion.startswith("<")})[0] == "a b"


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\fbox{x}", "x"),
        (r"\boxed 7, so", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed", None),
        (r"\boxedup{5}", None),
        ("none", None),
        (r"\boxed{" + "1" * 10_000 + "}", None),
        (r"\boxed{" * 5000, None),
    ],
)
def test_last_box_is_found(text, held):
    assert answer.last_box(text) == held


def test_last_answer_tag_counts():
    assert answer.tagged("<answer>1</answer><answer>2\n</answer>") == "2\n"
    assert answer.tagged("<answer>1") is None


def test_all_boxes_come_in_order_and_bounded():
    assert answer.all_boxes(r"\boxed{1} \boxed{2 \boxed{\frac12}") == ["1", r"\frac12"]
    assert len(answer.all_boxes(r"\boxed{1}" * 10_000)) == answer.MOST_BOXES
