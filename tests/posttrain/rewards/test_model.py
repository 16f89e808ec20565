"""A reward model as a reward: what it is shown, and in what company."""

import pytest

from dsjax.files import write_json
from dsjax.posttrain.initial import open_initial
from dsjax.posttrain.rewards import Grader
from dsjax.posttrain.rewards.model import ModelJudge
from tests.posttrain import toy


class FakeScorer:
    """Scores by length, and keeps what it is shown."""

    longest = 40

    def __init__(self, folder):
        initial = open_initial(folder)
        self.vocabulary, self.chat = initial.vocabulary, initial.chat
        self.shown, self.batches = [], []

    def many(self, rows):
        self.batches.append(len(rows))
        self.shown += rows
        return [float(len(ids)) for ids in rows]


@pytest.fixture(params=["V3", "base"])
def scorer(request, tmp_path):
    return FakeScorer(toy.write_hf(tmp_path / "c", "Qwen2", request.param))


def test_model_sees_prompt_and_final_answer(scorer):
    judged = ModelJudge(scorer).grade(["<think>long</think>\n\nyes"], [{"prompt": "is it?"}])
    text = scorer.vocabulary.coder.decode(scorer.shown[0], skip_special=True)
    assert (
        text.replace("<\uff5cUser\uff5c>", "").replace("<\uff5cAssistant\uff5c>", "") == "is it?yes"
    )
    assert scorer.shown[0][-1] == 1  # the end token
    assert judged[0].value == len(scorer.shown[0])


def test_answers_are_scored_together_and_returned_in_order(scorer):
    texts = ["a" * (n * 7 % 20) for n in range(35)]
    judged = ModelJudge(scorer).grade(texts, [{"prompt": "q"}] * 35)
    lengths = [len(text) for text in texts]
    assert [each.value - judged[0].value for each in judged] == lengths
    assert scorer.batches == [16, 16, 16]


def test_answer_too_long_for_the_model_is_not_judged(scorer):
    judged = ModelJudge(scorer).grade(["b" * 99, "<think>never"], [{"prompt": "q"}] * 2)
    assert judged[0].value is None and "too many to judge" in judged[0].error
    assert judged[1].value is not None  # judged as an empty answer


def test_run_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*gone .*tools/prefer\.py"):
        Grader([f"model:{tmp_path}/gone"])


def test_run_of_something_else_is_refused_at_once(tmp_path):
    """Not after the answers that it should judge have been drawn."""
    language = toy.write_hf(tmp_path / "hf", "Qwen2")
    policy = tmp_path / "policy"
    policy.mkdir()
    write_json(policy / "config.json", {"preference": {"kind": "dpo"}})
    for folder in (language, policy, tmp_path):
        with pytest.raises(ValueError, match=r"is not the run of a reward model.*tools/prefer\.py"):
            Grader([f"model:{folder}"])
    write_json(policy / "config.json", {"preference": {"kind": "pointwise"}})
    (policy / "checkpoints" / "8").mkdir(parents=True)
    for folder in (policy, policy / "checkpoints" / "8"):
        Grader([f"model:{folder}"]).close()
