"""Rejection sampling: files that grow and are resumed, and training data that is read back."""

import json
from pathlib import Path

import pytest

from dsjax.generate.sampling import Sampling
from dsjax.posttrain import rejection
from dsjax.posttrain.filters import Judged
from dsjax.posttrain.initial import open_initial
from dsjax.posttrain.messages import parse
from dsjax.posttrain.problems import Problem
from dsjax.posttrain.rejection import Parts, training_line
from dsjax.posttrain.responses import Respondent, Wanted
from dsjax.text.conversation import encode_conversations
from tests.posttrain import toy

SETTINGS = {"n": 4, "seed": 0}
ANSWERS = [Judged((n // 2, n % 2), f"text {n}\ud800", n, n % 2 == 0, n / 2) for n in range(6)]


def test_parts_return_what_was_added(tmp_path):
    parts = Parts(tmp_path / "a.parts", SETTINGS)
    parts.add(ANSWERS[:2])
    parts.add(ANSWERS[2:4])
    parts.close()
    parts = Parts(tmp_path / "a.parts", SETTINGS)
    parts.add(ANSWERS[4:])
    assert len(parts) == 6 and (2, 1) in parts and (3, 0) not in parts
    assert [parts.get(each.key) for each in ANSWERS] == ANSWERS
    parts.close()


@pytest.mark.parametrize("lost", [1, 5, 60])
def test_parts_forget_a_line_that_was_cut_short(tmp_path, lost):
    path = tmp_path / "a.parts"
    parts = Parts(path, SETTINGS)
    parts.add(ANSWERS)
    parts.close()
    path.write_bytes(path.read_bytes()[:-lost])
    parts = Parts(path, SETTINGS)
    assert len(parts) == 5
    parts.add(ANSWERS[5:])
    parts.close()
    parts = Parts(path, SETTINGS)
    assert [parts.get(each.key) for each in ANSWERS] == ANSWERS
    parts.close()
    path.write_bytes(b'{"settings"')  # killed while the first line was written
    parts = Parts(path, SETTINGS)
    assert len(parts) == 0
    parts.close()


def test_parts_of_other_settings_or_in_use_are_refused(tmp_path):
    parts = Parts(tmp_path / "a.parts", SETTINGS)
    with pytest.raises(ValueError, match=r"a\.parts is in use by another process; wait"):
        Parts(tmp_path / "a.parts", SETTINGS)
    parts.close()
    with pytest.raises(ValueError, match=r"a\.parts was made with other settings: seed 0, now 1"):
        Parts(tmp_path / "a.parts", SETTINGS | {"seed": 1})


@pytest.mark.parametrize("kind", ["R1", "V3", "base"])
def test_training_data_has_the_very_ids_that_were_sampled(tmp_path, kind):
    initial = open_initial(toy.write_hf(tmp_path / "c", "Qwen2", kind))
    problem = Problem("What?", {}, "f:1")
    respondent = Respondent(initial, [problem], Wanted(Sampling()))
    thought = {"R1": "so</think>Five", "V3": "Five", "base": "so Five"}[kind]
    line = training_line(respondent, 0, problem, Judged((0, 0), thought, 9, True, 1.0))
    if kind == "R1":  # whole, for those who do not know that the prompt opens the thought
        assert line["messages"][-1]["content"] == "<think>\nso</think>Five"
    assert line["reward"] == 1.0 and line["source"] == "f:1"
    conversation = parse(json.loads(json.dumps(line)), "f:1")
    (encoded,) = encode_conversations([conversation], initial.vocabulary, initial.chat)
    prompt = list(respondent.prompts[0])
    completion = [*initial.vocabulary.coder.encode_control(thought), 1]
    assert encoded.ids.tolist() == prompt + completion
    assert encoded.trained.tolist() == [False] * len(prompt) + [True] * len(completion)


class Stopped(BaseException):
    """Stands for Ctrl-C or a kill."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rejection")
    checkpoint = toy.write_hf(folder / "r1", "Qwen2", "R1")
    lines = [{"prompt": f"make {n}"} for n in range(4)]
    prompts = toy.write_lines(folder / "p.jsonl", lines)
    (folder / "mine.py").write_text("def even(text, problem): return float(len(text) % 2 == 0)\n")
    return checkpoint, prompts, f"{folder / 'mine.py'}:even"


def arguments(setting, out, **changes):
    checkpoint, prompts, reward = setting
    values = dict(
        checkpoint=checkpoint, prompts=str(prompts), out=out, n=3, reward=reward, keep="all",
        max_new_tokens=6, temperature=20.0, top_p=None, seed=0, max_batch=4, system="",
        template="", raw=False, dtype="float32", mesh={}, override=[],
    )  # fmt: skip
    return rejection.Order(**values | changes)


@pytest.mark.slow
def test_stopped_command_ends_with_the_same_file(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rejection, "JUDGED_TOGETHER", 2)
    monkeypatch.setattr("dsjax.posttrain.filters.fault", lambda answer, keep: None)
    rejection.run(arguments(setting, tmp_path / "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole.splitlines()) > 6

    kept, left = rejection.Parts.add, [0]

    def add(parts, answers):
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        kept(parts, answers)

    monkeypatch.setattr(rejection.Parts, "add", add)
    out = tmp_path / "out.jsonl"
    for allowed in (0, 1, 3):
        left[0] = allowed
        with pytest.raises(Stopped):
            rejection.run(arguments(setting, out))
        assert not out.exists() and Path(f"{out}.parts").exists()
    with pytest.raises(ValueError, match="with other settings: seed 0, now 1"):
        rejection.run(arguments(setting, out, seed=1))
    left[0] = 100
    rejection.run(arguments(setting, out))
    assert out.read_bytes() == whole and left[0] == 100 - 2
    assert not Path(f"{out}.parts").exists()

    report = json.loads(Path(f"{out}.report.json").read_text())
    assert report["samples"] == 12 == report["kept"] + sum(report["dropped"].values())
    capsys.readouterr()
    rejection.run(arguments(setting, out))  # nothing is left to do
    assert "kept" in capsys.readouterr().out and out.read_bytes() == whole
    with pytest.raises(ValueError, match="with other settings: keep 'all', now 'right'"):
        rejection.run(arguments(setting, out, keep="right"))


def test_file_of_somebody_else_is_refused(setting, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.jsonl exists and has no out\.jsonl\.report\.json"):
        rejection.run(arguments(setting, tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == "mine"
