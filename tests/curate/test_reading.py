"""Reading: every document once, in shards that depend on the files alone."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

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


def packed(pack, *texts):
    return pack("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())


def zipped(data):
    return gzip.compress(data, mtime=0)


def parquet(**columns):
    output = io.BytesIO()
    pq.write_table(pa.table(columns), output)
    return output.getvalue()


LONG = "x" * 3_000_000
ZSTD = zstandard.ZstdCompressor().compress
TWO = b'{"text": "a"}\n{"text": "b"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
# Name and bytes of a file, the texts that are read of it, and what is wrong with the rest.
MESSY = [
    ("empty.txt", b"", [], []),
    ("space.txt", b" \n", [" \n"], []),
    ("nul.txt", b"a\0b", ["a\0b"], []),
    ("windows.txt", b"a\r\nb\r\n", ["a\r\nb\r\n"], []),
    ("mark.txt", b"\xef\xbb\xbfa", ["a"], []),
    ("utf16.txt", "ab".encode("utf-16"), [], ["byte 0 is 0xff.*iconv -f UTF-16"]),
    ("latin.txt", b"caf\xe9", [], ["byte 3 is 0xe9"]),
    ("cut.txt", b"caf\xc3", [], ["byte 3 is 0xc3"]),
    ("surrogate.txt", b"\xed\xa0\x80", [], ["byte 0 is 0xed"]),
    ("no suffix", b"a", ["a"], []),
    ("UPPER.JSONL", TWO, ["a", "b"], []),
    ("name with \U0001f600 and\nbreak.txt", b"a", ["a"], []),
    ("[a]*?.txt", b"a", ["a"], []),
    ("a,b.txt", b"a", ["a"], []),
    (os.fsdecode(b"\xff.txt"), b"a", ["a"], []),
    ("n" * 251 + ".txt", b"a", ["a"], []),
    ("nothing.gz", b"", [], []),
    ("plain.txt.gz", b"plain", [], ["damaged or cut short .*rename it"]),
    ("cut.jsonl.gz", packed(zipped, "a")[:-6], ["a"], ["damaged or cut short"]),
    ("twice.jsonl.gz", packed(zipped, "a") + packed(zipped, "b"), ["a", "b"], []),
    ("behind.jsonl.gz", packed(zipped, "a") + b"junk", ["a"], ["damaged or cut short"]),
    ("cut.jsonl.bz2", packed(bz2.compress, "a")[:-4], ["a"], ["damaged or cut short"]),
    ("cut.jsonl.xz", packed(lzma.compress, "a")[:-4], ["a"], ["damaged or cut short"]),
    ("plain.jsonl.xz", TWO, [], ["damaged or cut short"]),
    ("cut.jsonl.zst", packed(ZSTD, "a")[:-4], [], ["the last frame is not complete"]),
    ("plain.jsonl.zst", TWO, [], ["damaged or cut short"]),
    ("mark.jsonl", b"\xef\xbb\xbf" + TWO, ["a", "b"], []),
    ("windows.jsonl", TWO.replace(b"\n", b"\r\n"), ["a", "b"], []),
    ("old mac.jsonl", TWO.replace(b"\n", b"\r"), [], ["line 1 is not JSON .*Extra data"]),
    ("blank.jsonl", b"\n \n" + TWO + b"\n", ["a", "b"], []),
    ("no break.jsonl", TWO[:-1], ["a", "b"], []),
    ("half.jsonl", TWO + b'{"text": "c', ["a", "b"], ["line 3 is not JSON"]),
    ("missing.jsonl", b'{"body": 1}\n' + TWO, ["a", "b"], ["line 1 has no field 'text' but body"]),
    ("null.jsonl", b'{"text": null}\n' + TWO, ["a", "b"], ["'text' is NoneType, not text"]),
    ("number.jsonl", b'{"text": 3}\n' + TWO, ["a", "b"], ["'text' is int, not text"]),
    ("list.jsonl", b'{"text": ["a"]}\n' + TWO, ["a", "b"], ["'text' is list, not text"]),
    ("twice.jsonl", b'{"text": "x", "text": "a"}', ["a"], []),
    ("nan.jsonl", b'{"text": "a", "score": NaN}', ["a"], []),
    ("digits.jsonl", b'{"text": "a", "n": %s}\n' % (b"1" * 5000) + TWO, ["a", "b"], ["not JSON"]),
    ("half pair.jsonl", b'{"text": "\\ud83d"}\n' + TWO, ["a", "b"], ["half of a surrogate pair"]),
    ("pair.jsonl", b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"], []),
    ("separator.jsonl", '{"text": "a\u2028b\x0b"}'.encode(), [], ["Invalid control character"]),
    ("array.json", b'["a"]', [], ["is a JSON list, not an object with 'text'.*jq"]),
    ("pretty.json", b'{\n"text": "a"\n}', [], ["line 1 is not JSON"] + ["not JSON"] * 2),
    ("deep.jsonl", b"[" * 100_000 + b"\n" + TWO, ["a", "b"], ["line 1 is not JSON"]),
    ("page.jsonl", b"<!doctype html>\n" + TWO, ["a", "b"], ["line 1 is not JSON"]),
    ("latin.jsonl", b'{"text": "\xe9"}\n' + TWO, ["a", "b"], [r"byte 10 \(line 1\) is 0xe9"]),
    ("long.jsonl", packed(bytes, LONG, "b"), [LONG, "b"], []),
    ("quote.csv", b'text,n\na,1\n"b,2\n', ["a"], ["line 4 is not CSV .*unexpected end"]),
    ("width.csv", b"text,n\na\nb,2\n", ["b"], ["line 2 has 1 fields and the header 2"]),
    ("header.csv", b"text,n\n", [], []),
    ("empty.csv", b"", [], []),
    ("other.csv", b"body\na\n", [], ["row 1 has no field 'text' but body"]),
    ("long.csv", b"text\n" + LONG.encode() + b"\n", [LONG], []),
    ("empty.parquet", b"", [], ["is not a readable parquet file"]),
    ("cut.parquet", parquet(text=["a"])[:-9], [], ["is not a readable parquet file"]),
    ("pointer.parquet", POINTER, [], ["is not a readable parquet file"]),
    ("rows.parquet", parquet(text=pa.array([], pa.string())), [], []),
    ("column.parquet", parquet(body=["a"]), [], ["has no column 'text' but body"]),
    ("null.parquet", parquet(text=["a", None, "b"]), ["a", "b"], ["row 2: 'text' is NoneType"]),
    ("bytes.parquet", parquet(text=[b"a"]), [], ["row 1: 'text' is bytes, not text"]),
    ("large.parquet", parquet(text=pa.array(["a"], pa.large_string())), ["a"], []),
    ("shared.parquet", parquet(text=pa.array(["a"]).dictionary_encode()), ["a"], []),
    ("cut.arrow", b"plain" * 9, [], ["is not a readable Arrow file"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "texts", "problems"), MESSY, ids=[ascii(case[0])[:40] for case in MESSY]
)
def test_messy_file_is_read_as_far_as_it_goes(tmp_path, name, data, texts, problems):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)

    def found(out, on_bad):
        source = Source(name="s", files=str(tmp_path / "in"))
        (job,) = reading.plan(Recipe(sources=(source,), on_bad=on_bad))
        (tmp_path / out).mkdir()
        return reading.read(job, tmp_path / out, 0)

    skipped = found("o1", "skip")
    parts = [shards.rows(tmp_path / "o1" / f"{part}.parquet") for part in skipped["shards"]]
    assert [row["text"] for part in parts for row in part] == texts
    assert skipped["rejected"] == len(problems) == len(skipped["problems"])
    for problem, expected in zip(skipped["problems"], problems, strict=True):
        assert re.search(expected, problem) and str(tmp_path) in problem
    if not problems:
        assert found("o2", "stop") | {"rejected": 0} == skipped
        return
    with pytest.raises(ValueError, match=problems[0]):
        found("o2", "stop")


def test_what_is_no_file_is_passed_over(tmp_path):
    folder = tmp_path / "in"
    (folder / "folder.txt").mkdir(parents=True)
    os.mkfifo(folder / "pipe.txt")
    for link, target in {"lost.txt": "nowhere", "self.txt": "self.txt", "good.txt": "../a"}.items():
        (folder / link).symlink_to(target)
    with pytest.raises(ValueError, match=r"in/\*' matches no file"):
        reading.plan(Recipe(sources=(Source(name="s", files=f"{folder}/*"),)))
    (tmp_path / "a").write_text("a")
    (job,) = reading.plan(Recipe(sources=(Source(name="s", files=f"{folder}/*"),)))
    assert [file.name for file in job.files] == ["good.txt"]


def test_file_that_vanished_or_cannot_be_opened_is_told(tmp_path, texts):
    jobs = reading.plan(recipe(texts, on_bad="skip"))
    (texts / "0.txt").unlink()
    (texts / "1.txt").unlink()
    (texts / "1.txt").mkdir()
    found = reading.read(jobs[0], tmp_path, 0)
    assert [row["id"] for row in shards.rows(tmp_path / "00000-0000.parquet")] == ["s/2.txt"]
    assert "0.txt: No such file" in found["problems"][0]
    assert "1.txt: Is a directory" in found["problems"][1]


def test_missing_field_is_set_where_a_recipe_has_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (job,) = reading.plan(Recipe(sources=(Source(name="s", files=f"{tmp_path}/a.jsonl"),)))
    with pytest.raises(ValueError, match="set text_field of its Source in a recipe; or go on"):
        reading.read(job, tmp_path, 0)
    found = reading.read(dataclasses.replace(job, skip=True), tmp_path, 0)
    assert found["problems"][0].endswith("set text_field of its Source in a recipe")
