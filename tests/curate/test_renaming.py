"""Local variables get other names, and a program does what it did."""

import builtins
import re

import pytest

from dsjax.curate import renaming

PROGRAM = '''"""A module."""
import os as system

LIMIT = 3


def work(words, *, sep=" "):  # joins
    """Works."""
    joined = sep.join(w.upper() for w in words)
    for i, letter_of in enumerate(joined):
        if i >= LIMIT:
            break
    try:
        joined = joined + f"{letter_of!r:>5}{{i}}"
        del i
    except KeyError as problem:
        raise ValueError(problem) from problem

    def inner(a):
        sep2 = [joined for joined in range(a)]
        return joined, sep2, a

    def counter():
        nonlocal_count = 0
        return nonlocal_count + len(joined)

    class Kept:
        short = joined[:2]
        attribute = joined

    if (m := len(joined)) > 2:
        m += 1
    with open(system.devnull) as stream:
        match joined:
            case str() as seen:
                pass
    return inner(2), counter(), Kept.attribute, m, stream.closed, seen, [j for j in (joined,)]


def shared():
    total_of = 0

    def add():
        nonlocal total_of
        total_of += 1

    add()
    return total_of


def keyword_is_kept():
    sep = "-"
    return work(["a", "b"], sep=sep)
'''


def result(text):
    space = {}
    exec(compile(text, "x", "exec"), space)
    return space["work"](["ab", "cd"], sep="+"), space["shared"](), space["keyword_is_kept"]()


def test_program_does_what_it_did_under_other_names():
    pytest.importorskip("libcst")
    renamed = renaming.rename(PROGRAM, 0)
    assert result(renamed) == result(PROGRAM)
    words = set(re.findall(r"\w+", renamed))
    assert not {"letter_of", "stream", "m", "nonlocal_count"} & words
    assert {"work", "words", "sep", "joins", "LIMIT", "system", "total_of", "Kept"} <= words
    assert renamed.count("\n") == PROGRAM.count("\n") and "# joins" in renamed
    assert renaming.rename(PROGRAM, 0) == renamed != renaming.rename(PROGRAM, 1)


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n",
        "def f(a):\n    b = a\n    return locals()\n",
        "def f(:\n",
        "def f(a):\n    return a\n",
        "def f():\n    global a\n    a = 1\n",
        "",
        "\0",
    ],
)
def test_what_cannot_be_renamed_stays(text):
    pytest.importorskip("libcst")
    assert renaming.rename(text, 0) == text


def test_missing_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.startswith("libcst"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"dsjax\[prepare\].*rename=0"):
        renaming.library()
