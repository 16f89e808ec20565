"""Reading: every document once, in shards that depend on the files alone."""

import json

import pytest

from dsjax.curate import reading, shards
from dsjax.curate.recipe import Recipe, Source


def recipe(folder, **options):
    source = Source(name="s", files=f"{folder}/*.txt,{folder}/*.jsonl")
    return Recipe(sources=(source,), **({"shard_bytes": 1024} | options))


def read(tmp_path, chosen):
    folder = tmp_path / "out"
    folder.mkdir()
    found = [reading.read(job, folder, n) for n, job in enumerate(reading.plan(chosen))]
    names = [name for part in found for name in part["shards"]]
    rows = [list(shards.rows(folder / f"{name}.parquet")) for name in names]
    return found, rows


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"{number} " * 200)
    lines = [json.dumps({"text": f"line {number} " * 60}) for number in range(9)]
    (folder / "z.jsonl").write_text("\n".join(lines))
    return folder


def test_documents_are_grouped_by_size_and_cut(tmp_path, texts):
    found, rows = read(tmp_path, recipe(texts))
    assert [[row["id"] for row in shard] for shard in rows] == [
        ["s/0.txt", "s/1.txt", "s/2.txt"],
        ["s/3.txt", "s/4.txt", "s/5.txt"],
        ["s/z.jsonl:1", "s/z.jsonl:2", "s/z.jsonl:3"],
        ["s/z.jsonl:4", "s/z.jsonl:5", "s/z.jsonl:6"],
        ["s/z.jsonl:7", "s/z.jsonl:8", "s/z.jsonl:9"],
    ]
    assert sum(part["documents"] for part in found) == 15
    assert sum(part["bytes"] for part in found) == sum(
        len(row["text"]) for shard in rows for row in shard
    )
    assert rows[0][1] == {"id": "s/1.txt", "source": "s", "path": "1.txt", "text": "1 " * 200}


def test_bad_file_and_bad_record_stop_or_are_written_down(tmp_path, texts):
    (texts / "3.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"source s: .*3\.txt is not UTF-8.*[^p]; or go .*=skip$"):
        read(tmp_path, recipe(texts))
    lines = (texts / "z.jsonl").read_text().splitlines()
    (texts / "z.jsonl").write_text("\n".join([*lines[:4], '{"text": 3}', "{", *lines[6:]]))
    (tmp_path / "again").mkdir()
    found, rows = read(tmp_path / "again", recipe(texts, on_bad="skip"))
    names = [row["id"] for shard in rows for row in shard]
    assert "s/3.txt" not in names and "s/4.txt" in names
    assert names[-4:] == ["s/z.jsonl:4", "s/z.jsonl:7", "s/z.jsonl:8", "s/z.jsonl:9"]
    assert sum(part["rejected"] for part in found) == 3
    reading.save_rejected(tmp_path / "again/out", len(found), tmp_path / "rejected.jsonl")
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    problems = [item["problem"] for item in rejected]
    assert [item["file"][-7:] for item in rejected] == ["n/3.txt", "z.jsonl", "z.jsonl"]
    assert "0xe9" in problems[0] and "line 5: 'text' is int" in problems[1]
    assert "line 6 is not JSON" in problems[2]
    assert [text for part in found for text in part["problems"]] == problems


def test_identity_follows_the_files(texts):
    before = reading.identity(reading.plan(recipe(texts)))
    assert before == reading.identity(reading.plan(recipe(texts)))
    (texts / "0.txt").write_text("other")
    assert before != reading.identity(reading.plan(recipe(texts)))


def test_file_of_two_sources_is_refused(texts):
    sources = tuple(Source(name=name, files=f"{texts}/*.txt") for name in "ab")
    with pytest.raises(ValueError, match="is in the sources a and b"):
        reading.plan(Recipe(sources=sources))


def test_files_of_two_folders_have_names_of_their_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "same.txt").write_text(name)
    source = Source(name="s", files=f"{tmp_path}/in/a/*.txt,{tmp_path}/in/b/*.txt")
    _, rows = read(tmp_path, Recipe(sources=(source,)))
    assert [row["id"] for row in rows[0]] == ["s/a/same.txt", "s/b/same.txt"]


def test_repositories_stay_whole(tmp_path):
    for name in ("one/a.py", "one/b.py", "one/c/d.py", "one/e.py", "two/a.py", "z.py"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 400)
    source = Source(name="s", files=f"{tmp_path}/in/**/*.py", kind="code", repositories="random")
    jobs = reading.plan(Recipe(sources=(source,), shard_bytes=1024))
    assert [[file.name for file in job.files] for job in jobs] == [
        ["one/a.py", "one/b.py", "one/c/d.py", "one/e.py"],
        ["two/a.py", "z.py"],
    ]
