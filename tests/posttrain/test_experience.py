"""What becomes of answers: verdicts, advantages, rows, lines of samples.jsonl, and numbers."""

import json

import numpy as np
import pytest

from dsjax.parallel.mesh import make_mesh
from dsjax.posttrain.advantages import process_advantages
from dsjax.posttrain.experience import Clock, Experience, completion_text, row_length
from dsjax.posttrain.problems import Problem
from dsjax.posttrain.questions import Questions
from dsjax.posttrain.rewards.worth import Worth
from dsjax.posttrain.rollout import Answer
from dsjax.posttrain.updates import PolicyState
from dsjax.text.chat import find_format
from dsjax.text.vocabulary import open_vocabulary
from dsjax.train.step import declared_model
from tests.posttrain import toy
from tests.posttrain.shapes import QWEN2, config_of
from tests.posttrain.test_verdicts import Graders
from tests.text import released


def test_row_holds_the_longest_and_divides_over_context():
    assert row_length(10, make_mesh({"data": 1}, 1)) == 10  # 9 predicted, an even number
    assert row_length(11, make_mesh({"data": 1}, 1)) == 10
    assert row_length(11, make_mesh({"data": 1, "context": 4}, 4)) == 16


def test_clock_names_what_passed():
    clock = Clock()
    clock.lap("a")
    clock.lap("b")
    assert list(clock.seconds) == ["a", "b"] and min(clock.seconds.values()) >= 0


class Scripted:
    """Answers with the seed's last digit, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.costs = [], {}

    def answer(self, params, router, prompts, sampling, own_seeds, most, *, kept=False):
        self.asked.append((tuple(prompts), tuple(own_seeds)))
        return [
            Answer((seed % 10 + ord("0") - ord("!") + 3, 1), np.zeros(2, np.float32), None, True)
            for seed in own_seeds
        ]


@pytest.fixture
def source(tmp_path):
    return made(tmp_path)


def made(folder, **rl):
    rl = {"beta": 0.0, "rewards": ("countdown",), "log_samples": 4} | rl
    config = config_of(QWEN2, **rl)
    released.write_checkpoint(folder / "hf", toy.CONTROL["R1"])
    vocabulary = open_vocabulary(folder / "hf", toy.VOCAB_SIZE)
    problems = [Problem(str(n), {"answer": str(n)}, f"p:{n}") for n in range(5)]
    chat = find_format(folder / "hf", vocabulary)
    questions = Questions(problems, vocabulary, chat, config.rl, context=64)
    table = {str(digit): (float(digit % 2), 0.0) for digit in range(10)}
    grader, rollouts, said = Graders(("countdown", "format"), table), Scripted(), []
    mesh = make_mesh({"data": 1}, 1)
    declared = declared_model(config.shape, config.precision)
    found = Experience(
        config, questions, grader, rollouts, vocabulary, declared, mesh, folder, said.append
    )
    return found, rollouts, grader, said


STATE = PolicyState({}, {}, (), None)


def test_step_takes_the_next_questions_and_packs_their_answers(source):
    experience, rollouts, grader, _ = source
    taken = experience.take(2, STATE)
    assert taken.rows == range(0, 2) and taken.tokens == 12
    prompts, seeds = rollouts.asked[0]
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3] and len(set(seeds)) == 6
    weights, advantages = (np.asarray(taken.batch[name]) for name in ("weights", "advantages"))
    assert weights.shape == (1, 3, 2, 15)  # a row has no room for two answers of 8 tokens
    assert (weights != 0).sum() == 12  # two tokens of each answer, the end token among them
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert abs(advantages.sum()) < 1e-5
    assert set(taken.batch) == {"tokens", "segment_ids", "weights", "advantages", "samp"}
    assert taken.metrics["length"] == 2 and taken.metrics["cut_off"] == 0
    assert taken.metrics["judging_limits"] == 2 and taken.metrics["rollout_tokens_per_second"] > 0
    experience.close()
    assert grader.closed


def test_samples_are_written_with_what_they_are_worth(source, tmp_path):
    experience, rollouts, _, _ = source
    experience.take(2, STATE)
    experience.take(2, STATE)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 4 + [2] * 4
    assert not set(rollouts.asked[0][1]) & set(rollouts.asked[1][1])  # each step draws anew
    for line, seed in zip(lines[:4], rollouts.asked[0][1], strict=False):
        assert line["text"] == str(seed % 10) and line["tokens"] == 2 and line["ended"]
        assert line["reward"] == line["rewards"]["countdown"] == seed % 10 % 2
        assert line["prompt"].endswith("<think>\n")
    assert {"step", "prompt", "text", "rewards", "advantage"} <= lines[0].keys()
    assert "steps" not in lines[0]


def test_rewards_of_steps_reach_the_tokens_of_each_step(tmp_path):
    """Answers are a digit and the end token; one step ends with the digit, or is all there is."""
    experience, _, grader, _ = made(tmp_path, log_samples=-1)
    grader._table = {
        str(digit): (Worth(0.5, ((1, digit / 10.0),)) if digit % 2 else 1.0, 0.0)
        for digit in range(10)
    }
    taken = experience.take(2, STATE)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for group in (lines[:3], lines[3:]):
        digits = [int(line["text"]) for line in group]
        rewards = [digit / 10 if digit % 2 else 1.0 for digit in digits]
        ((first, *_), (second, *_), (third, *_)) = process_advantages(
            [[r] for r in rewards], [[0]] * 3, [1] * 3
        )
        wanted = [first, second, third] if any(digit % 2 for digit in digits) else [0, 0, 0]
        np.testing.assert_allclose([line["advantage"] for line in group], wanted, rtol=1e-6)
        stepped = [line for line in group if int(line["text"]) % 2]
        assert all(line["steps"]["countdown"][0][0] == 1 for line in stepped)
    assert np.asarray(taken.batch["advantages"]).any()


def test_resumed_source_draws_and_writes_the_same(tmp_path):
    (tmp_path / "whole").mkdir()
    whole, rollouts, *_ = made(tmp_path / "whole")
    for _ in range(3):
        whole.take(2, STATE)
    (tmp_path / "part").mkdir()
    part, first, *_ = made(tmp_path / "part")
    part.take(2, STATE)
    saved = part.state()
    part.take(2, STATE)  # this step is lost
    again, second, *_ = made(tmp_path / "part")
    again.restore(json.loads(json.dumps(saved)))
    again.take(2, STATE)
    again.take(2, STATE)
    assert first.asked[:1] + second.asked == rollouts.asked
    texts = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "part")]
    assert texts[0] == texts[1]
    assert again.state() == whole.state() != saved


def test_other_questions_are_refused_on_resuming(source):
    experience, *_ = source
    with pytest.raises(ValueError, match=r"restore rl\.problems"):
        experience.restore({"taken": 2, "questions": "others", "seed": 0})


def test_flat_steps_in_a_row_are_said_once_with_the_way_out(tmp_path):
    experience, _, grader, said = made(tmp_path, flat_after=2)
    grader._table = {str(digit): (0.0, 0.0) for digit in range(10)}
    for _ in range(4):
        experience.take(2, STATE)
    assert len(said) == 1 and "up to step 2, since no answer is right" in said[0]


def test_completion_text_drops_the_end_token_alone():
    class Vocabulary:
        class coder:
            decode = staticmethod(lambda ids, skip_special: f"{list(ids)} {skip_special}")

    zeros = np.zeros(2, np.float32)
    assert completion_text(Answer((7, 1), zeros, None, True), Vocabulary) == "[7] False"
    assert completion_text(Answer((7, 8), zeros, None, False), Vocabulary) == "[7, 8] False"
