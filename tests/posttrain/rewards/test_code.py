"""The code rule: published forms of tests, and programs that attack their judge."""

import os
import time
from pathlib import Path

import pytest

from dsjax.posttrain.problems import Problem, problem
from dsjax.posttrain.rewards import Grader

ADD = {"entry": "add", "tests": [[[1, 2], 3], [[5, 7], 12]]}
DOUBLE = {"tests": [{"input": "4\n", "output": "8\n"}, {"input": "5\n", "output": "10"}]}
ASSERTS = {"tests": {"asserts": "import math\nassert f(1) == (1, {2})\nassert len(f(2)) == 2\n"}}


@pytest.fixture(scope="module")
def judge():
    with Grader(["code"], workers=1) as grader:
        yield lambda code, facts=ADD: grader.grade([code], [facts])[0]["code"]


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        ("def add(a, b): return a + b", 1),
        ("So:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1),
        ("```\ndef add(a, b): return a + b\n```", 1),
        ("```python\ndef add(a, b): return a - b\n```", 0),
        ("```python\ndef add(a, b): return 3\n```", 0),
        ("```python\ndef add(a, b): pass\n```\n```python\ndef add(a, b): return a + b\n```", 1),
        ("```python\ndef add(a, b): return a + b\n```\n```bash\nls\n```", 1),
        ("<think>t</think>\n```python\ndef add(a, b): return a + b\n```", 1),
        ("<think>\n```python\ndef add(a, b): return a + b\n```", 0),
        ("<think>\n```python\ndef add(a, b): return a + b\n```\n</think>", 0),
        ("class Solution:\n    def add(self, a, b): return a + b", 1),
        ("add = 5", 0),
        ("def add(a, b: return", 0),
        ("", 0),
        ("def add(a, b): return float(a + b)", 1),
        ("def add(a, b): return str(a + b)", 0),
        ("if __name__ == '__main__': raise SystemExit(1)\ndef add(a, b): return a + b", 1),
        ("import dataclasses, threading\ndef add(a, b): return a + b", 1),
    ],
)
def test_function_is_worth(judge, completion, worth):
    assert judge(completion) == worth


@pytest.mark.parametrize(
    ("result", "wanted", "same"),
    [
        ("(1, [2, 3])", [1, [2, 3]], 1),
        ("True", True, 1),
        ("1", True, 0),
        ("True", 1, 0),
        ("None", None, 1),
        ("0.1 + 0.2", 0.3, 1),
        ("0.3001", 0.3, 0),
        ("10**30", 10**30, 1),
        ("10**30 + 1", 10**30, 0),
        ("{1: 'a', None: 2}", {"1": "a", "null": 2}, 1),
        ("{'a': 1}", {"a": 2}, 0),
        ("float('nan')", "nan", 0),
        ("{1}", [1], 0),
        ("object()", None, 0),
        ("10**5000", 5, 0),
        ("'\\ud800'", "\ud800", 1),
    ],
)
def test_values_agree_as_json(judge, result, wanted, same):
    facts = {"entry": "f", "tests": [[[], wanted]]}
    assert judge(f"def f(): return {result}", facts) == same


@pytest.mark.parametrize(
    ("program", "worth"),
    [
        ("print(int(input()) * 2)", 1),
        ("import sys\nprint(float(sys.stdin.read()) * 2, '\\n')", 1),
        ("print(int(input()) * 2, end='')", 1),
        ("print(int(input()) * 3)", 0),
        ("print(int(input()) * 2)\nprint()\nprint(1)", 0),
        ("print(int(input()) * 2)\nraise SystemExit(3)", 0),
        ("print(8)", 0),
        ("import os, time\nprint(int(input()) * 2, flush=True)\nos.close(1)\ntime.sleep(60)", 0),
        ("while True: print(8)", 0),
        ("import sys\nsys.stdout.buffer.write(b'\\xff')", 0),
    ],
)
def test_program_is_worth(judge, program, worth):
    began = time.monotonic()
    assert judge(f"```python\n{program}\n```", DOUBLE) == worth
    assert time.monotonic() - began < 30


def test_program_reads_more_than_a_pipe_holds(judge):
    text = "7 " * 200_000
    facts = {"tests": [{"input": text, "output": str(7 * 200_000)}]}
    assert judge("print(sum(map(int, input().split())))", facts) == 1
    assert judge("print(1400000)", facts) == 1  # it need not read at all


@pytest.mark.parametrize(
    ("program", "worth"),
    [
        ("def f(x): return (x, {x + 1})", 1),
        ("def f(x): return (x, {2})", 1),
        ("def f(x): return [x, {x + 1}]", 0),
        ("def f(x): raise ValueError", 0),
        ("def g(x): return 1", 0),
        ("def f(x): print('passed'); return 0", 0),
    ],
)
def test_assertions_hold_or_not(judge, program, worth):
    assert judge(program, ASSERTS) == worth


def test_no_tests_prove_nothing(judge, caplog):
    assert judge("def add(a, b): return a + b", {"entry": "add", "tests": []}) is None
    assert "'tests' is empty" in caplog.text


def test_published_forms_of_benchmarks_are_judged(judge):
    begun = "from typing import List\n\ndef twice(x):\n    return 2 * x\n\ndef four(x: List):\n"
    test = "def check(candidate):\n    assert candidate([1]) == twice(twice(1))\n"
    human_eval = problem({"prompt": begun, "entry_point": "four", "test": test}, "f:1").fields
    assert judge("    return twice(twice(x[0]))\n\nprint(four(9\n", human_eval) == 1
    assert judge("    return 5\n", human_eval) == 0
    assert judge("```python\ndef four(x: List):\n    return 4 * x[0]\n```", human_eval) == 1
    mbpp = problem({"text": "Square.", "test_list": ["assert sq(-3) == 9"]}, "f:1").fields
    assert judge("```python\ndef sq(x):\n    return x * x\n```", mbpp) == 1


ATTACKS = {
    "exit": "import os\ndef add(a, b): os._exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "forged": "import os\nos.write(1, b'{\"value\": 3}\\n')\ndef add(a, b): return 0",
    "forged value": "import os\ndef add(a, b):\n    [os.write(n, b'{\"value\": 3}\\n') for n in"
    " range(3, 9)]\n    return 0",
    "always equal": "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = None\n"
    "def add(a, b): return E(0)",
    "modules": "import sys, json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\n"
    "sys.modules['__main__'].encode = lambda v: True\ndef add(a, b): return 0",
    "stack": "import sys\ndef add(a, b):\n    frame = sys._getframe()\n    while frame:\n"
    "        for k, v in list(frame.f_locals.items()):\n            if k == 'wanted': return v\n"
    "        frame = frame.f_back\n    return 0",
    "overwritten harness": "import glob, sys\nfor p in [sys.argv[0], 'tests.py']:\n"
    "    open(p, 'w').write('')\ndef add(a, b): return a + b",
    "huge": "def add(a, b): return [0] * 10**9",
    "much": "def add(a, b): return 'x' * (50 << 20)",
    "deep": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "endless output": "def add(a, b):\n    while True: print('x' * 9999)",
    "endless results": "import os\ndef add(a, b):\n    while True: os.write(4, b'x' * 9999)",
    "asleep": "import signal, time\ndef add(a, b):\n    signal.signal(signal.SIGTERM,"
    " signal.SIG_IGN)\n    time.sleep(600)",
    "children": f"import subprocess\nfor _ in range(5):\n    try: subprocess.Popen(['sleep', '600"
    f".{os.getpid()}'], start_new_session=True)\n    except OSError: pass\ndef add(a, b): 0",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: break\n"
    "def add(a, b): return 0",
    "parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef add(a, b): return 3",
    "memory of the parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)\n"
    "def add(a, b): return a + b",
    "network": "import socket\nsocket.socket()\ndef add(a, b): return a + b",
}

SLOW = ("asleep", "endless output")  # they take all the time that they have


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the fences are Linux's")
@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(code, id=name, marks=[pytest.mark.heavy] if name in SLOW else [])
        for name, code in ATTACKS.items()
    ],
)
def test_attack_is_worth_nothing_and_leaves_no_process(judge, attack):
    began = time.monotonic()
    assert judge(f"```python\n{attack}\n```") == 0
    assert time.monotonic() - began < 40
    assert judge("def add(a, b): return a + b") == 1
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        assert f"600.{os.getpid()}".encode() not in words
        assert not any(word.startswith(b"/tmp/dsjax-answer-") for word in words), words


def test_answer_writes_in_its_folder_alone(judge, tmp_path):
    code = "def add(a, b):\n    with open({!r}, 'w') as file: file.write('x')\n    return a + b"
    assert judge(code.format("mine.txt")) == 1
    before = set(tmp_path.iterdir())
    judge(code.format(str(tmp_path / "other.txt")))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({}, "'tests' is None, not a list such as"),
        ({"tests": []}, "'tests' is"),
        ({"tests": [[[1], 2]]}, "'entry' is None, not the name of the function"),
        ({"tests": [[1, 2]], "entry": "f"}, "test 0 is .*, not .*arguments.*result"),
        ({"tests": [{"input": "1"}]}, "test 0 has no texts 'input' and 'output'"),
        ({"tests": {"asserts": "assert f(1"}}, "the assertions in 'tests' are no Python"),
        ({"tests": {"asserts": "assert 1"}}, "the assertions in 'tests' call no function"),
    ],
)
def test_problem_without_tests_is_refused_before_the_run(facts, complaint):
    with Grader(["code"], workers=1) as grader:
        grader.check([Problem("q", each, "f:1") for each in (ADD, DOUBLE, ASSERTS)])
        with pytest.raises(ValueError, match=f"f:2: reward 'code': {complaint}"):
            grader.check([Problem("q", facts, "f:2")])
