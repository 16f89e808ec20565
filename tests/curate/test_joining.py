"""Repositories as documents."""

from dsjax.curate import deciding, joining, reading, shards, tagging
from dsjax.data import splitting

FILES = [
    ("one/a.py", "import b\n", ""),
    ("one/b.py", "x = 1\n", ""),
    ("one/bad.py", "(\n", "parses"),
    ("one/sub/notes.txt", "text\n", ""),
    ("single.py", "y = 2\n", ""),
    ("two/c.py", "z = 3\n", ""),
    ("two/d.py", "import c\n", ""),
]


def join(tmp_path, order, files=FILES):
    paths = {"documents": [], "verdicts": []}
    for number, part in enumerate((files[:2], files[2:])):  # a repository in two shards
        for key, schema in (("documents", reading.SCHEMA), ("verdicts", deciding.SCHEMA)):
            path = tmp_path / f"{key}{number}.parquet"
            paths[key].append(path)
            with shards.Writer(path, schema) as writer:
                for name, text, verdict in part:
                    path = name.partition(":")[0]
                    row = {"id": f"s/{name}", "source": "s", "path": path, "text": text}
                    writer.add(row if key == "documents" else {"verdict": verdict})
    folder = tmp_path / "out"
    folder.mkdir()
    job = joining.Job(*map(tuple, paths.values()), order, False, 2, 0)
    found = joining.join(job, folder, 7)
    rows = list(shards.rows(folder / "00007.parquet"))
    tags = list(shards.rows(folder / "00007.tags.parquet"))
    assert [row["id"] for row in rows] == [row["id"] for row in tags]
    assert [row["bytes"] for row in tags] == [len(row["text"]) for row in rows]
    assert tags[0]["digest"] == splitting.digest_bytes(rows[0]["text"], tagging.DIGEST)
    assert len(list(shards.rows(folder / "00007.verdicts.parquet"))) == len(rows)
    return found, {row["id"]: row["text"] for row in rows}


def test_imported_files_first_and_others_alone(tmp_path):
    found, texts = join(tmp_path, "imports")
    assert texts == {
        "s/one": "# b.py\nx = 1\n\n# a.py\nimport b\n",
        "s/one/sub/notes.txt": "text\n",
        "s/single.py": "# single.py\ny = 2\n",
        "s/two": "# c.py\nz = 3\n\n# d.py\nimport c\n",
    }
    assert (found["documents"], found["files"]) == (4, 6)
    assert found["counts"] == {"s": {"parses": [1, 2]}}
    assert found["samples"][0][2][0][1:] == ("s/one/bad.py", "(\n")


def test_random_order_takes_all_files(tmp_path):
    _, texts = join(tmp_path, "random")
    assert list(texts) == ["s/one", "s/single.py", "s/two"]
    assert all(part in texts["s/one"] for part in ("# a.py\n", "# b.py\n", "# sub/notes.txt\n"))


def test_documents_of_one_file_are_all_there(tmp_path):
    files = [("one/x.jsonl:1", "p\n", ""), ("one/x.jsonl:2", "q\n", ""), ("y.jsonl:1", "r\n", ""),
             ("y.jsonl:2", "s\n", "")]  # fmt: skip
    for order in ("imports", "random"):
        (tmp_path / order).mkdir()
        found, texts = join(tmp_path / order, order, files)
        whole = "".join(texts.values())
        assert found["files"] == 4 and all(text in whole for _, text, _ in files)
