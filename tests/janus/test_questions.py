"""Questions are read as benchmarks publish them, and marked by rule."""

import io
import json

import PIL.Image
import pytest

from dsjax.janus import questions
from dsjax.janus.questions import CHOOSE, SHORT, read_questions


def png(colour="red"):
    file = io.BytesIO()
    PIL.Image.new("RGB", (3, 3), colour).save(file, "PNG")
    return file.getvalue()


def test_mmmu_has_pictures_in_the_table_and_options_as_python_prints_them(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "id": "validation_1",
            "question": "<image 1> Which is it in <image 2>?",
            "options": "['a cat', \"it's a dog\"]",
            "answer": "B",
            "image_1": {"bytes": png("red"), "path": "1.png"},
            "image_2": {"bytes": png("blue"), "path": None},
            "image_3": None,
        },
        {
            "id": "validation_2",
            "question": "How many? <image 1>",
            "options": "[]",
            "answer": "['24/7', '3.429']",
            "image_1": {"bytes": png("green"), "path": None},
            "image_2": None,
            "image_3": None,
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "validation.parquet")
    one, two = read_questions(str(tmp_path / "validation.parquet"))
    assert one.pictures == (png("red"), png("blue")) and one.answers == ("B",)
    assert one.asked.text == f"Which is it in ?\n(A) a cat\n(B) it's a dog\n{CHOOSE}"
    assert two.options == () and two.asked.text == f"How many?\n{SHORT}"
    assert two.answers == ("24/7", "3.429") and two.is_right("3.429.") and two.is_right("24/7")


def test_gqa_has_questions_by_their_ids_and_pictures_in_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "n12.jpg").write_bytes(png())
    content = {"07": {"imageId": "n12", "question": "Is it red?", "answer": "yes", "types": {}}}
    (tmp_path / "testdev.json").write_text(json.dumps(content))
    (found,) = read_questions(str(tmp_path / "testdev.json"), tmp_path / "images")
    assert found.place.endswith("testdev.json:07") and found.pictures == (png(),)
    assert found.asked.text == f"Is it red?\n{SHORT}"


@pytest.mark.parametrize("form", ["lines", "list", "lines named .json"])
def test_plain_questions_have_one_right_answer_or_several(form, tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    records = [
        {"image": "0.png", "question": "What colour?", "answer": ["red", "crimson"]},
        {"image": "0.png", "question": "What?", "answer": "A wall."},
    ]
    path = tmp_path / ("asked.jsonl" if form == "lines" else "asked.json")
    lines = "\n".join(map(json.dumps, records))
    path.write_text(json.dumps(records) if form == "list" else lines)
    one, two = read_questions(str(path))
    assert one.answers == ("red", "crimson") and two.answers == ("A wall.",)


OPTIONS = ("a cat", "a dog", "Both A and B")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b", None),
        ("B. a dog", "B"),
        ("The answer is B", "B"),
        ("The answer is (A), not B.", "A"),
        ("A dog", "B"),  # no letter, but the text of an option
        ("A", "A"),
        ("A cat is there", None),
        ("the dog!", "B"),
        ("Both A and B", "B"),  # the letter that stands alone
        ("D", None),
        ("", None),
    ],
)
def test_option_is_a_lone_letter_or_its_own_text(reply, letter):
    assert questions.chosen(reply, OPTIONS) == letter


@pytest.mark.parametrize(
    ("reply", "right"),
    [("Red", True), ("The red.", True), (" crimson ", True), ("reddish", False), ("", False)],
)
def test_short_answer_is_one_of_the_right_ones_whatever_its_case_and_articles(reply, right):
    asked = questions.Question("x", (png(),), "What colour?", (), ("red", "a crimson"))
    assert asked.is_right(reply) == right


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("3.5", "3.5", True),
        ("It is 3.5.", "it is 3.5", True),
        ("35", "3.5", False),
        (".5", "5", False),
        ("-5", "5", False),
        ("-5.", "-5", True),
        ("247", "24/7", False),
        ("930", "9:30", False),
        ("1,000", "1000", True),
        ("black-and-white", "blackandwhite", True),
        ("[0, 5]", "[0, 5]", True),
        ("0", "[0, 5]", False),
        ("A", "A", True),
        ("", "A", False),
        ("the", "A", False),
    ],
)
def test_what_belongs_to_a_number_is_no_punctuation(reply, answer, right, tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    record = {"image": "0.png", "question": "?", "answer": answer}
    (tmp_path / "asked.jsonl").write_text(json.dumps(record))
    (asked,) = read_questions(str(tmp_path / "asked.jsonl"))
    assert asked.is_right(reply) == right


@pytest.mark.parametrize(
    ("reply", "options", "letter"),
    [
        ("I think it is (C)", ("0",) * 9, "C"),
        ("I think so", ("0",) * 9, None),
        ("I", ("0",) * 9, "I"),
        ("-5", ("5", "-5"), "B"),
        ("well-known", ("well-known",), "A"),
    ],
)
def test_letters_of_many_options_and_of_one(reply, options, letter):
    assert questions.chosen(reply, options) == letter


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "0.png", "answer": "x"}, r"asked.jsonl:1 has no question"),
        ({"image": "0.png", "question": "?"}, r"asked.jsonl:1: answer=None is not a text"),
        ({"image": "0.png", "question": "?", "answer": ""}, r"asked.jsonl:1: answer='' is not a"),
        ({"image": "0.png", "question": "?", "answer": {"x": 1}}, r"answer={'x': 1} is not a text"),
        ({"question": "?", "answer": "x"}, r"asked.jsonl:1 has no picture"),
        ({"image": "1.png", "question": "?", "answer": "x"}, r"there is no picture .*1.png"),
        (
            {"image": "asked.jsonl", "question": "?", "answer": "x"},
            r"asked.jsonl:1 is not a picture in PNG",
        ),
        (
            {"image": "0.png", "question": "?", "answer": "C", "options": ["x", "y"]},
            r"answer='C' is not a letter of its 2 options",
        ),
        (
            {"image": "0.png", "question": "?", "answer": "A", "options": "[x"},
            r"options='\[x' is not a list",
        ),
        (
            {"image": "0.png", "question": "?", "answer": "A", "options": "5"},
            r"options=5 is not a l",
        ),
        (
            {"image": "0.png", "question": "?", "answer": "A", "options": ["x"] * 27},
            r"is not a list of at most 26",
        ),
    ],
)
def test_incomplete_question_is_named(record, message, tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "asked.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read_questions(str(tmp_path / "asked.jsonl"))


def test_file_of_no_questions_is_named(tmp_path):
    (tmp_path / "asked.json").write_text("5")
    with pytest.raises(ValueError, match=r"asked.json is 5; give an object or a list of questions"):
        read_questions(str(tmp_path / "asked.json"))
