"""Running programs. They run in a pool's processes, since each ends all children of its own."""

import pytest

from dsjax.posttrain.verify import Call, Pool

MODULE = "dsjax.posttrain.execution"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with Pool(1) as pool:
        yield lambda function, *given: pool.run(
            [Call(f"tests.posttrain.executing:{function}", given, 10.0, 60.0)]
        )[0]


def test_program_prints_and_function_returns(run):
    assert run("printed", "print(input()[::-1])", "abc\n").value == "cba\n"
    assert run("returned", "def f(x, y): return (x, y)", "f", [1, 2]).value == "((1, 2),)"
    assert run("returned", "def f(): return f", "f", []).value == "None"
    assert run("passes", "def f(x): return x", "assert f(3) == 3", ["f"]).value is True
    assert run("passes", "def f(x): return 2", "assert f(3) == 3", ["f"]).value is False


def test_what_is_written_in_place_of_a_result_is_none(run):
    """The program reaches the pipe of its results, but not the judge."""
    forged = '{"value": {"float": 1' + "0" * 400 + "}}"
    program = (
        "import contextlib, os\n"
        "for place in range(3, 20):\n"
        "    with contextlib.suppress(OSError):\n"
        f"        os.write(place, b'{forged}\\n')\n"
        "def f(): return 1\n"
    )
    outcome = run("returned", program, "f", [])
    assert (outcome.value, outcome.error) == ("None", None)


def test_program_that_closes_its_input_is_not_written_to_again(run):
    program = "import os, time; os.close(0); time.sleep(0.5); print('done')"
    output, writes = run("writes", program, "x" * (1 << 20)).value
    assert output == "done\n" and writes < 20


def test_limits_hold(run):
    assert run("printed", "while True: pass", "").value is None
    assert run("printed", "x = bytearray(2 << 30); print(1)", "").value is None
    assert run("printed", "open('a', 'wb').write(bytes(2 << 20)); print(1)", "").value is None
    assert run("printed", "print('x' * (2 << 20))", "").value is None
    outcome = run("printed", "import resource as r; print(r.getrlimit(r.RLIMIT_CPU)[1])", "")
    assert outcome.value == "1\n"


def test_folder_is_empty_and_goes(run):
    assert run("printed", "import os; print(os.listdir())", "").value == "['answer.py']\n"
    place = run("printed", "import os; open('a', 'w'); print(os.getcwd())", "").value.strip()
    assert run("exists", place).value is False


def test_environment_of_the_trainer_is_not_the_programs(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert run("printed", "import os; print(sorted(os.environ))", "").value == "['LANG', 'PATH']\n"


def test_children_of_an_unfenced_program_are_ended_too(run):
    """Where the kernel lets a program start others, they end with it."""
    assert run("left_behind").value == []
