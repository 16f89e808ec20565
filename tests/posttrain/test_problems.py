"""Problems in the forms in which they are published."""

import base64
import gzip
import json
import pickle
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsjax.posttrain.problems import Problem, problem, read_problems


def one(**record):
    return problem(record, "f.jsonl:1")


def test_problems_of_a_file_keep_fields_and_places(tmp_path):
    lines = [{"prompt": "a", "answer": "1", "mine": [1]}, {"prompt": "b", "answer": None}]
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    assert read_problems(str(path)) == [
        Problem("a", {"answer": "1", "mine": [1]}, f"{path}:1"),
        Problem("b", {}, f"{path}:3"),
    ]


def test_problems_of_parquet_keep_all_columns(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"problem": ["a", "b"], "answer": [1, 2]}), path)
    assert read_problems(str(path))[1] == Problem("b", {"answer": "2"}, f"{path}:2")


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"problem": "q", "solution": r"so \boxed{\frac12}"}, r"\frac12"),  # MATH
        ({"problem": "q", "solution": "s", "answer": 33}, "33"),  # AIME
        ({"Problem": "q", "Solution": "s", "Answer": 33}, "33"),
        ({"question": "q", "answer": "6 x 7 = <<6*7=42>>42\n#### 42"}, "42"),  # GSM8K
        ({"prompt": "q", "solution": "$4$"}, "$4$"),  # TRL
        ({"prompt": "q", "reward_model": {"style": "rule", "ground_truth": "9"}}, "9"),  # verl
        ({"prompt": "q"}, None),
    ],
)
def test_answer_is_found_under_published_names(record, answer):
    assert one(**record).fields.get("answer") == answer


def test_countdown_is_found_under_published_names():
    truth = {"target": 9, "numbers": [4, 5]}
    for record in ({"nums": [4, 5], "target": 9}, {"reward_model": {"ground_truth": truth}}):
        fields = one(prompt="q", **record).fields
        assert (fields["numbers"], fields["target"]) == ([4, 5], 9) and "answer" not in fields


def test_tests_of_human_eval_and_mbpp_become_assertions():
    found = one(prompt="def f(x):\n", entry_point="f", test="def check(c):\n    assert c(1) == 2\n")
    assert found.fields["entry"] == "f" and found.fields["begun"] == "def f(x):\n"
    assert found.fields["tests"]["asserts"].endswith("\n\ncheck(f)\n")
    found = one(text="Add.", test_list=["assert f(1) == 2"], test_setup_code="import math")
    assert found.fields["tests"] == {"asserts": "import math\nassert f(1) == 2\n"}
    assert "assert f(1) == 2" in found.prompt  # else nobody could know the function's name


def test_tests_of_live_code_bench_are_read_without_a_pickle():
    cases = [{"input": "[1, 2]\n3", "output": "[4]", "testtype": "functional"}]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()
    found = one(
        question_content="Q", starter_code="class Solution:", metadata='{"func_name": "go"}',
        public_test_cases=json.dumps(cases), private_test_cases=packed,
    )  # fmt: skip
    assert found.fields["tests"] == [[[[1, 2], 3], [4]]] * 2 and found.fields["entry"] == "go"
    assert "class Solution:" in found.prompt
    found = one(
        question_content="Q",
        public_test_cases=[{"input": "1\n", "output": "2\n", "testtype": "stdin"}],
    )
    assert found.fields["tests"] == [{"input": "1\n", "output": "2\n"}]


def test_tests_of_apps_are_pairs():
    found = one(question="q", inputs=["1\n"], outputs=["2\n"])
    assert found.fields["tests"] == [{"input": "1\n", "output": "2\n"}]
    found = one(question="q", inputs=[[1]], outputs=[2], fn_name="f")
    assert found.fields["tests"] == [[[1], 2]] and found.fields["entry"] == "f"


def test_facts_hold_the_prompt_and_how_the_thought_begins():
    found = Problem("q", {"answer": "1"}, "f:1")
    assert found.facts(opened=True) == {"answer": "1", "prompt": "q", "opened": True}
    assert found.messages == [{"role": "user", "content": "q"}]
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert one(prompt=turns).messages == turns


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"promt": "q", "answer": "1"}, r"f\.jsonl:1 has no prompt but 'answer', 'promt'; give it"),
        ({"prompt": " "}, "f.jsonl:1: 'prompt' is empty"),
        ({"prompt": 5}, "'prompt' is int, neither a text nor messages"),
        ({"prompt": []}, "'prompt' is list, neither a text nor messages"),
        ({"prompt": [{"role": "user"}]}, "message 0 of 'prompt' is not an object with 'role'"),
        ({"prompt": [{"role": "bot", "content": "x"}]}, "has the role 'bot', none of system, user"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "last message of 'prompt' is the as"),
        ({"prompt": "x\ud800"}, "'prompt' holds half of a surrogate pair at character 1"),
        ({"prompt": "q", "answer": ["1"]}, "'answer' is list, not a text or a number"),
        ({"prompt": "q", "public_test_cases": "[1"}, "'public_test_cases' is not JSON"),
        ({"prompt": "q", "public_test_cases": [3]}, "'public_test_cases' holds no list of tests"),
        ({"prompt": "q", "private_test_cases": "A"}, "'private_test_cases' is neither JSON nor"),
        ({"prompt": "q", "private_test_cases": "\u00e9"}, "'private_test_cases' is neither JSON"),
        ({"prompt": "q", "test_list": [1]}, "'test_list', 'test_imports' .* are texts"),
        ({"prompt": "q", "inputs": [1], "outputs": []}, "1 'inputs' and 0 'outputs'"),
    ],
)
def test_bad_problem_is_refused_with_its_place(record, message):
    with pytest.raises(ValueError, match=message):
        one(**record)


def test_empty_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"--problems='.*' holds no problem"):
        read_problems(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt is neither JSON lines .* nor \.parquet"):
        read_problems(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match=r"rl\.problems='.*' matches no file"):
        read_problems(str(tmp_path / "b.jsonl"), key="rl.problems")
