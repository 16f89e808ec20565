"""Files by glob: as Python's own finds them, but once, and in bounded time."""

import glob
import os

import pytest

from dsjax.data import folders

NAMES = ("a.txt", "b/a.txt", "b/c/d.txt", "b/c/e.md", ".hidden/a.txt", "b/.f.txt", "[x]/a.txt")


@pytest.fixture
def tree(tmp_path):
    for name in NAMES:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "tree"


@pytest.mark.parametrize("pattern", ["*", "**", "**/*.txt", "b/**/*.txt", "**/c/**/*", "*/*.txt"])
def test_matching_is_as_pythons(tree, monkeypatch, pattern):
    def files(found):
        return sorted({os.path.abspath(path) for path in found if os.path.isfile(path)})

    expected = files(glob.glob(f"{tree}/{pattern}", recursive=True))
    assert files(folders.matching(f"{tree}/{pattern}")) == expected != []
    monkeypatch.chdir(tree)
    assert files(folders.matching(pattern)) == expected


def test_links_are_followed_out_but_not_around(tree, tmp_path):
    (tmp_path / "data/more").mkdir(parents=True)
    (tmp_path / "data/more/x.txt").write_text("x")
    (tmp_path / "data/y.txt").write_text("y")
    (tmp_path / "above.txt").write_text("z")
    for link, target in {
        "b/up": "..", "b/c/same": ".", "out": "../data", "again": "../data/more", "z": "b",
        "b/c/above": "../../..",
    }.items():  # fmt: skip
        (tree / link).symlink_to(target)
    (tmp_path / "data/back").symlink_to(tree)
    found = [os.path.relpath(path, tree) for path in folders.matching(f"{tree}/**/*.txt")]
    own = ["[x]/a.txt", "a.txt", "b/a.txt", "b/c/d.txt"]
    assert sorted(found) == sorted([*own, "again/x.txt", "out/y.txt"])


def test_folder_that_cannot_be_read_is_named(tree, monkeypatch):
    def scandir(path, real=os.scandir):
        if path.endswith("/c"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot read .*/b/c: Permission denied"):
        list(folders.walk(str(tree)))
