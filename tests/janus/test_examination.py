"""Replies come in the order of the questions, from the pictures of each, and are marked."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint.load import open_checkpoint
from dsjax.janus.examination import Examinee, marked
from dsjax.janus.questions import Asked, Question
from tests.golden import vl2
from tests.vision import toy


def png(seed):
    rng, file = np.random.default_rng(seed), io.BytesIO()
    colour = tuple(255 * rng.integers(0, 2, 3))  # as far from one another as can be
    PIL.Image.new("RGB", (9, 9), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("janus") / "base")


@pytest.mark.heavy
def test_reply_depends_on_its_own_pictures_alone(folder):
    examinee = Examinee(open_checkpoint(folder), None, "float32", 4)
    asked = [Asked("x", (png(seed),), "What is it?") for seed in (*range(8), 0)]
    asked += [Asked("x", (png(0), png(1)), "What is it?"), Asked("x", (png(0),), "Who?")]
    together = examinee.answers(asked, 6)
    assert together == [examinee.answers([each], 6)[0] for each in asked]
    assert together[0] == together[8] and together[0] != together[9]


def test_bad_picture_is_named(folder):
    examinee = Examinee(open_checkpoint(folder), None, "float32", 4)
    with pytest.raises(ValueError, match=r"asked.jsonl:7 is not a picture"):
        examinee.answers([Asked("asked.jsonl:7", (b"none",), "?")], 2)


def test_question_without_room_is_named(folder):
    examinee = Examinee(open_checkpoint(folder), None, "float32", 4)
    asked = [Asked("asked.jsonl:8", (png(0),), "?" * 300)]
    with pytest.raises(
        ValueError, match=r"asked.jsonl:8 takes .* exceeds model.max_seq_len=512; lower"
    ):
        examinee.answers(asked, 300)


def test_question_that_spells_other_pictures_is_named(tmp_path):
    examinee = Examinee(
        open_checkpoint(vl2.write(tmp_path, vl2.CASES["heads"])), None, "float32", 4
    )
    with pytest.raises(ValueError, match=r"asked.jsonl:9: the message spells <image> 2 times"):
        examinee.answers([Asked("asked.jsonl:9", (png(0),), "<image> or <image>?")], 2)


def test_accuracy_has_its_interval_and_every_reply():
    questions = [Question(f"q{n}", (b"",), "?", (), ("yes",)) for n in range(8)]
    report = marked(questions, ["Yes.", "no"] * 4)
    assert (report["right"], report["questions"], report["accuracy"]) == (4, 8, 0.5)
    assert 0.21 < report["low"] < 0.22 and 0.78 < report["high"] < 0.79  # Wilson's, of 4 in 8
    assert [each["right"] for each in report["replies"]] == [True, False] * 4
    json.dumps(report)
