"""The order of stages, with sources of several kinds."""

import pytest

from dsjax.curate import language, prepare, report, shards
from dsjax.curate.recipe import Recipe, Source


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "identify", lambda text: ("en", 0.9))
    monkeypatch.setattr(language, "library", lambda: "a library 1")
    monkeypatch.setattr(report, "save", lambda found, table, out: None)
    files = {
        "src/one/a.py": "# uses b\nimport b\n",
        "src/one/b.py": "# is used\nx = 1\n",
        "src/one/bad.py": "# not Python\n(\n",
        "src/two/c.py": "# alone\ny = 2\n",
        "src/three/c.py": "# alone\ny = 2\n",
        "text/a.txt": "The end of the road and that of the river are near each other.",
        "text/b.txt": "What was to be done with the old bridge, nobody knew but the crow.",
    }
    for name, text in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(folder, **options):
    sources = (
        Source(name="code", files=f"{folder}/in/src/**/*.py", kind="code", repositories="imports"),
        Source(name="text", files=f"{folder}/in/text/*.txt"),
    )
    off = ("words", *(f"top_{n}_gram" for n in range(2, 5)))
    rules = tuple(f"plain.en.{name}=off" for name in off)
    options = {"heldout_fraction": 0.0, "duplicates": "exact", "rules": rules} | options
    found = prepare.prepare(Recipe(sources=sources, **options), folder / "out", 1)
    paths = sorted((folder / "out/text").glob("train-*.parquet"))
    return found, {row["id"]: row["text"] for path in paths for row in shards.rows(path)}


def test_repositories_and_files_side_by_side(folder):
    found, texts = run(folder)
    assert set(texts) == {"code/one", "code/three", "text/a.txt", "text/b.txt"}
    assert texts["code/one"].index("# b.py") < texts["code/one"].index("# a.py")
    assert found["sources"]["code"] == {
        "kind": "code",
        "read": [5, 77],
        "languages": {"any": 5},
        "removed": {"exact_duplicate": [1, 21], "parses": [1, 15]},
        "train": [2, len(texts["code/one"]) + len(texts["code/three"])],
        "heldout": [0, 0],
    }
    assert found["duplicate_groups"] == {"2": 1}


def test_evaluation_files_and_no_deduplication(folder):
    (folder / "test.txt").write_text("nobody knew but the crow")
    found, texts = run(folder, duplicates="off", decontaminate=f"{folder}/test.txt")
    assert set(texts) == {"code/one", "code/two", "code/three", "text/a.txt"}
    assert found["sources"]["text"]["removed"] == {"contaminated": [1, 66]}


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "empty; name files"),
        (b"\xff", r"what they hold was skipped \(1\), first: .*not UTF-8"),
    ],
)
def test_files_without_a_document_are_named(folder, data, why):
    (folder / "none.txt").write_bytes(data)
    source = Source(name="none", files=f"{folder}/none.txt")
    with pytest.raises(ValueError, match=rf"none\.txt have no document: {why}"):
        prepare.prepare(Recipe(sources=(source,), on_bad="skip"), folder / "out", 1)
