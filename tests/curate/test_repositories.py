"""The order of files in a repository."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.curate import repositories

PYTHON = {
    "pkg/__init__.py": "from pkg.top import main\n",
    "pkg/top.py": "import os, pkg.middle as m\nfrom .low import (\n  a,\n  b as o,\n)\n",
    "pkg/middle.py": "from . import low\nfrom pkg.sub.deep import x\n",
    "pkg/low.py": "import sys\n",
    "pkg/sub/deep.py": "from ..low import thing  # up\n",
}


def test_python_imports():
    assert repositories.imports(PYTHON) == {
        "pkg/__init__.py": {"pkg/top.py"},
        "pkg/top.py": {"pkg/middle.py", "pkg/low.py"},
        "pkg/middle.py": {"pkg/low.py", "pkg/sub/deep.py", "pkg/__init__.py"},
        "pkg/low.py": set(),
        "pkg/sub/deep.py": {"pkg/low.py"},
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {
                "src/a.c": '#include "b.h"\n#include <stdio.h>',
                "inc/b.h": "",
                "c.c": "# include <inc/b.h>",
            },
            {"src/a.c": {"inc/b.h"}, "c.c": {"inc/b.h"}},
        ),
        (
            {
                "src/x/A.java": "import x.y.B;\nimport static java.util.List.of;",
                "src/x/y/B.java": "",
            },
            {"src/x/A.java": {"src/x/y/B.java"}},
        ),
        (
            {"A.cs": "using My.Tools;\nusing System;", "b/B.cs": "namespace My.Tools\n{}"},
            {"A.cs": {"b/B.cs"}},
        ),
        ({"a/x.h": "", "b/x.h": "", "b/y.c": '#include "x.h"'}, {"b/y.c": {"b/x.h"}}),
    ],
    ids=["c", "java", "c#", "nearest"],
)
def test_imports_of_other_languages(files, expected):
    found = repositories.imports(files)
    assert {path: others for path, others in found.items() if others} == expected


def test_imported_files_come_first():
    for seed in range(5):
        order = repositories.by_imports(PYTHON, seed)
        assert sorted(order) == sorted(PYTHON)
        # One circle: the package imports top, middle the package.
        assert order[:2] == ["pkg/low.py", "pkg/sub/deep.py"]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7))), st.integers(0, 3))
def test_order_without_circles_is_topological(edges, seed):
    edges = {(one, other) for one, other in edges if other < one}
    files = {
        f"m{n}.py": "".join(f"import m{other}\n" for one, other in edges if one == n)
        for n in range(8)
    }
    order = repositories.by_imports(files, seed)
    places = {path: place for place, path in enumerate(order)}
    assert len(places) == 8
    assert all(places[f"m{one}.py"] > places[f"m{other}.py"] for one, other in edges)
    assert order == repositories.by_imports(dict(reversed(files.items())), seed)


def test_files_that_import_nothing_are_in_random_order():
    files = {f"f{n}.py": "" for n in range(20)}
    assert repositories.by_imports(files, 0) != repositories.by_imports(files, 1)


def test_random_order_depends_on_paths_and_seed_alone():
    paths = [f"f{n}" for n in range(20)]
    found = repositories.at_random(paths, 0)
    assert sorted(found) == sorted(paths) and found == repositories.at_random(paths[::-1], 0)
    assert found != repositories.at_random(paths, 1)


def test_files_begin_with_their_path():
    files = {"a.py": "x = 1", "b/c.rs": "fn\n", "q.sql": "", "p.md": "Hi"}
    assert repositories.join(files, ["b/c.rs", "a.py", "p.md", "q.sql"]) == (
        "// b/c.rs\nfn\n\n# a.py\nx = 1\n\n<!-- p.md -->\nHi\n\n-- q.sql\n\n"
    )
