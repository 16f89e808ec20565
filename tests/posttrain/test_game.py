"""The countdown game: its problems have answers, its demonstrator is honest, its files fit."""

import json
import random
import re

import pytest

from dsjax.posttrain import game
from dsjax.posttrain.game import Problem, Try
from dsjax.posttrain.rewards import score
from dsjax.text.tokenizer import EOS
from dsjax.text.vocabulary import open_vocabulary

SHOWN = re.compile(r"<think>(.*)</think><answer>(.*)</answer>", re.DOTALL)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("game")
    game.write_game(folder, seed=3, n_texts=300, n_cold=400, n_held_out=50)
    return folder


def test_try_is_worked_out_step_by_step():
    each = Try((17, 4, 9), ("+", "-"))
    assert (each.values, each.expression) == ([17, 21, 12], "17+4-9")
    assert each.worked == "17+4=21-9=12"


def test_every_problem_can_be_solved_and_no_step_leaves_the_range():
    problems = game.all_problems()
    assert len(set(problems)) == len(problems) == 1981
    for problem in problems[::97]:
        hits = [each for each in game.tries(problem.numbers) if each.values[-1] == problem.target]
        assert hits
        for each in hits:
            assert min(each.values) >= 0 and max(each.values) <= game.LARGEST_VALUE
            answer = f"<think></think><answer>{each.expression}</answer>"
            assert score("countdown", answer, problem._asdict()) == 1


def test_a_fixed_share_of_the_problems_is_held_out_whatever_the_seed():
    problems = game.all_problems()
    share = sum(problem.is_held_out for problem in problems) / len(problems)
    assert share == pytest.approx(0.28, abs=0.02)
    assert sum(problem.is_held_out for problem in problems) >= 500
    assert Problem((4, 9, 17), 12).is_held_out == Problem((4, 9, 17), 12).is_held_out


def test_demonstration_stops_at_a_hit_and_answers_its_last_try():
    rng = random.Random(0)
    problems, lengths, right = game.all_problems(), [], 0
    for _ in range(2000):
        problem = rng.choice(problems)
        completion = game.demonstrate(problem, rng)
        match = SHOWN.fullmatch(completion)
        assert match
        made = re.findall(r"([^:;]*)=(\d+):(\d+), (yes|no);", match[1])
        assert re.sub(r"=\d+", "", made[-1][0]) == match[2]
        hits = [int(value) == problem.target for _, value, _, _ in made]
        assert not any(hits[:-1])
        assert [verdict == "yes" for *_, verdict in made] == hits
        assert {int(target) for _, _, target, _ in made} == {problem.target}
        reward = score("countdown", completion, problem._asdict())
        assert reward == (1 if hits[-1] else 0.1)
        right += reward == 1
        lengths.append(len(made))
    assert max(lengths) <= game.MOST_TRIES and min(lengths) == 1
    assert 0.35 < right / 2000 < 0.46  # the bar that reinforcement learning has to pass


def test_no_file_but_one_has_held_out_problems(files):
    held_out = {(tuple(line["numbers"]), line["target"]) for line in read(files / "held_out.jsonl")}
    assert len(held_out) == 50
    train = {(tuple(line["numbers"]), line["target"]) for line in read(files / "problems.jsonl")}
    assert not held_out & train and len(train) > 1400
    prompts = {line["prompt"] for line in read(files / "held_out.jsonl")}
    assert not prompts & {line["prompt"] for line in read(files / "cold_start.jsonl")}
    texts = [line["text"].split("\n")[0] + "\n" for line in read(files / "base.jsonl")]
    assert not prompts & set(texts) and sum(":" in text for text in texts) > 50


def test_files_follow_from_the_seed(files, tmp_path):
    game.write_game(tmp_path, seed=3, n_texts=300, n_cold=400, n_held_out=50)
    for path in files.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_tokenizer_has_an_id_for_each_number_sign_tag_and_verdict(files):
    vocabulary = open_vocabulary(files, game.VOCAB_SIZE)
    text = "4 9 17:12\n<think>17+4=21-9=12:12, yes;</think><answer>17+4-9</answer>"
    ids = vocabulary.coder.encode(text)
    assert vocabulary.coder.decode(ids) == text
    prompt, thought, answer = 8, 1 + 9 + 3 + 1, 7
    assert len(ids) == prompt + thought + answer
    for awkward in ("100", "07", "2 007:999"):
        assert vocabulary.coder.decode(vocabulary.coder.encode(awkward)) == awkward
    assert vocabulary.stop_ids == {vocabulary.coder.control[EOS]}
    assert max(ids) < game.VOCAB_SIZE
