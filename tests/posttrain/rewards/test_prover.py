"""A program's verdict, with a stand-in for a proof checker."""

import os
import sys
import time
from pathlib import Path

import pytest

from dsjax.posttrain.rewards import Grader

PROGRAM = """
import json, subprocess, sys, time
case = json.load(sys.stdin)
code = case["code"] or ""
print("checking", case["problem"]["name"])
if "theorem" in code:
    print(json.dumps({"verdict": "sorry" not in code}))
elif code == "half\\n": print('{"verdict": 0.5}')
elif code == "null\\n": print('{"verdict": null}')
elif code == "fail\\n": print('{"verdict": 1}'); sys.exit(3)
elif code == "text\\n": print('{"verdict": "1"}')
elif code == "leave\\n":
    subprocess.Popen(["sleep", sys.argv[1]], start_new_session=True)
    print('{"verdict": 1}')
elif case["answer"] is None: print('{"verdict": 0}')
"""


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("prover") / "check it.py"
    path.write_text(PROGRAM)
    mark = f"599.{os.getpid()}"
    name = f"prover:{sys.executable} '{path}' {mark}"
    with Grader([name], workers=1) as grader:
        yield lambda text: grader.grade([text], [{"name": "t"}])[0][name], mark


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        ("```lean4\ntheorem a : 1 = 1 := rfl\n```", 1.0),
        ("```lean4\ntheorem a : 1 = 2 := sorry\n```", 0.0),
        ("<think>\n```\ntheorem a\n```", 0.0),
        ("```\nhalf\n```", 0.5),
        ("```\nnull\n```", None),
        ("```\nfail\n```", None),
        ("```\ntext\n```", None),
        ("no code", None),  # the program says nothing
    ],
)
def test_verdict_is_the_programs(judge, completion, worth):
    assert judge[0](completion) == worth


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_what_the_program_started_ends_with_it(judge):
    grade, mark = judge
    began = time.monotonic()
    assert grade("```\nleave\n```") == 1.0
    assert time.monotonic() - began < 20
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert path.read_bytes() != f"sleep\0{mark}\0".encode()
        except OSError:
            continue


@pytest.mark.parametrize("command", ["gone-program -x", "' ", "   "])
def test_program_that_is_not_there_is_refused(command):
    with pytest.raises(ValueError, match=r"there is no program|No closing quotation"):
        Grader([f"prover:{command}"])
