"""Reading: formats, order, the embedded default, and every way in which a file can be bad."""

import gzip
import json
import os
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dsjax.data import documents
from dsjax.data.documents import (
    embedded_sources,
    find_sources,
    read_documents,
    read_records,
)

TEXTS = ["first\nline", "\u00fcber \U0001f600", "  spaces kept \r\n"]


def read(pattern: Path | str, text_field: str = "text") -> list[tuple[str, str]]:
    sources = find_sources(str(pattern))
    return [(d.name, d.text) for d in read_documents(sources, text_field=text_field)]


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "jsonl.gz", "jsonl.zst", "JSONL"])
def test_documents_of_json_lines_survive_compression(tmp_path, suffix):
    data = json_lines(TEXTS)
    if suffix.endswith("gz"):
        data = gzip.compress(data)
    if suffix.endswith("zst"):
        # Two frames, as concatenated files have.
        pack = zstandard.ZstdCompressor().compress
        data = pack(data[:20]) + pack(data[20:])
    path = write(tmp_path / f"a.{suffix}", data)
    assert read(path) == [(f"a.{suffix}:{i + 1}", text) for i, text in enumerate(TEXTS)]


def test_documents_of_a_large_zstd_file_come_whole(tmp_path):
    texts = [f"{i} " * 5000 for i in range(100)]
    data = zstandard.ZstdCompressor().compress(json_lines(texts))
    assert [text for _, text in read(write(tmp_path / "a.jsonl.zst", data))] == texts


def test_documents_of_parquet_come_from_the_named_column(tmp_path):
    pq.write_table(pa.table({"text": ["no"] * 3, "body": TEXTS}), tmp_path / "a.parquet")
    assert [text for _, text in read(tmp_path / "a.parquet", "body")] == TEXTS


def test_documents_of_text_are_whole_files_byte_for_byte(tmp_path):
    for name, text in zip(("a.txt", "b.md", "c.txt.gz"), TEXTS, strict=True):
        data = text.encode()
        write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert [text for _, text in read(tmp_path / "*")] == TEXTS


def test_documents_without_text_are_left_out_but_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": ""}\n\n{"text": "x"}\n')
    assert read(path) == [("a.jsonl:3", "x")]


def test_sources_are_sorted_unique_and_named_below_the_constant_folder(tmp_path):
    for name in ("b/2.txt", "a/3.txt", "a/1.txt"):
        write(tmp_path / name, b"x")
    sources = find_sources(f"{tmp_path}/**/*.txt, {tmp_path}/a/1.txt")
    assert [source.name for source in sources] == ["a/1.txt", "a/3.txt", "b/2.txt"]


def test_sources_expand_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", b"x")
    assert [source.name for source in find_sources("~/*.txt")] == ["a.txt"]


def test_sources_take_an_existing_name_with_glob_characters(tmp_path):
    path = write(tmp_path / "a[1].txt", b"x")
    assert [source.path for source in find_sources(str(path))] == [str(path)]


def test_position_depends_on_name_and_number_only(tmp_path):
    write(tmp_path / "one/a.jsonl", json_lines(["x", "y"]))
    write(tmp_path / "two/a.jsonl", json_lines(["other", "text"]))
    write(tmp_path / "two/0.txt", b"new")
    one, two = (
        {d.name: d.position for d in read_documents(find_sources(f"{tmp_path}/{folder}/*"))}
        for folder in ("one", "two")
    )
    assert one.items() < two.items()
    assert len(set(two.values())) == 3


def test_embedded_sources_are_this_pythons_library():
    sources = embedded_sources()
    names = [source.name for source in sources]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "__pycache__", "encodings"}
    source = sources[names.index("ast.py")]
    assert next(read_documents([source])).text == Path(source.path).read_text("utf-8")


def test_embedded_reading_follows_declared_encodings_and_skips_broken_ones(tmp_path, monkeypatch):
    write(tmp_path / "latin.py", b"# coding: latin-1\n# \xfc\n")
    write(tmp_path / "broken.py", b"1\n2\n# \xfc\n")
    write(tmp_path / "unknown.py", b"# coding: no-such\n")
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(tmp_path))
    found = list(read_documents(embedded_sources()))
    assert [(d.name, d.text) for d in found] == [("latin.py", "# coding: latin-1\n# \u00fc\n")]


def test_embedded_sources_reject_a_python_without_source(tmp_path, monkeypatch):
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"no \.py files in .*; set data\.files"):
        embedded_sources()


# The data of a case is its name too, so it must not hold the time of day.
CUT_GZIP = gzip.compress(json_lines(TEXTS), mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8: byte 3 is 0xff; convert it"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"not UTF-8: byte 24 \(line 2\) is 0xff"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl line 2 is not JSON .*one complete obj"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1 is not JSON"),
        ("a.json", b'["x"]', r"line 1 is a JSON list, not an object with 'text'"),
        ("a.jsonl", b'{"body": "x"}', r"line 1 has no field 'text' but body; set data\.text_field"),
        ("a.jsonl", b'{"text": 3}', r"line 1: 'text' is int, not text; .* set data\.text_field"),
        ("a.jsonl", b'{"text": "x\\ud800"}', r"line 1: 'text' holds half of a surrogate .* 1; rep"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz is damaged .*rename it if it is not \.gz"),
        ("a.jsonl.gz", CUT_GZIP, r"jsonl\.gz is damaged or cut short"),
        ("a.txt.zst", b"plain", r"a\.txt\.zst is damaged .*rename it if it is not \.zst"),
        (
            "a.jsonl.zst",
            zstandard.ZstdCompressor().compress(json_lines(TEXTS))[:-4],
            r"damaged or cut short \(the last frame is not complete\)",
        ),
        ("a.parquet", b"plain", r"a\.parquet is not a readable parquet file"),
        ("a.jsonl", b'{"m": 3}', r"line 1 has no field 'text' but m"),
        ("a.zip", b"PK", r"a\.zip is \.zip, which is not read; unpack it, or name the other files"),
        ("a.pdf.gz", b"x", r"a\.pdf\.gz is \.pdf, which is not read; convert it to text"),
        ("a.parquet.gz", b"x", r"\.parquet has its own compression; unpack \.gz"),
    ],
)
def test_reading_rejects_bad_files_by_name(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, data))


def test_reading_rejects_bad_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", None], "n": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"has no column 'body' but text, n; set data\.text_field"):
        read(path, "body")
    with pytest.raises(ValueError, match=r"row 2: 'text' is NoneType, not text"):
        read(path)


def test_reading_names_the_missing_package(tmp_path, monkeypatch):
    for module, name in (("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")):
        monkeypatch.setitem(sys.modules, module, None)
        path = write(tmp_path / name, b"x")
        with pytest.raises(ValueError, match=rf"{name} needs {module}: pip install {module}"):
            read(path)


def test_sources_reject_globs_without_files(tmp_path):
    write(tmp_path / "a.txt", b"x")
    (tmp_path / "empty").mkdir()
    cases = {
        f"{tmp_path}/*.md": r"data\.files='.*\*\.md' matches no file .*check the path",
        f"{tmp_path}/a.txt,{tmp_path}/b": r"b' matches no file",
        f"{tmp_path}/empty": r"the folder is empty",
        " , ": r"data\.files=' , ' names no file",
    }
    for pattern, message in cases.items():
        with pytest.raises(ValueError, match=message):
            find_sources(pattern)
    os.mkfifo(tmp_path / "pipe")
    for name in (str(tmp_path / "pipe"), "/dev/null"):
        with pytest.raises(ValueError, match=rf"{name}' is a pipe or a device, .*; save what"):
            find_sources(name)
    with pytest.raises(ValueError, match=r"^data\.heldout_files="):
        find_sources("nowhere/*", key="data.heldout_files")


def test_reading_rejects_a_file_that_vanished(tmp_path):
    path = write(tmp_path / "a.txt", b"x")
    sources = find_sources(str(path))
    path.unlink()
    for attempt in (
        lambda: list(read_documents(sources)),
        lambda: documents.read_bytes(sources[0]),
        lambda: documents.check_unchanged(sources),
    ):
        with pytest.raises(ValueError, match=re.escape(f"cannot read {path}: No such file")):
            attempt()


def test_check_unchanged_rejects_a_file_written_to(tmp_path):
    path = write(tmp_path / "a.txt", b"x")
    sources = find_sources(str(path))
    documents.check_unchanged(sources)
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match=r"a\.txt changed while it was read; run again"):
        documents.check_unchanged(sources)


def test_records_keep_all_fields_and_say_their_places(tmp_path):
    write(tmp_path / "a.jsonl", b'{"x": 1}\n\n{"x": [2], "y": null}\n')
    pq.write_table(pa.table({"x": [3, 4]}), tmp_path / "b.parquet")
    found = list(read_records(find_sources(str(tmp_path / "*"))))
    places = [f"{tmp_path}/{place}" for place in ("a.jsonl:1", "a.jsonl:3", "b.parquet:1")]
    assert found[:3] == list(zip(places, [{"x": 1}, {"x": [2], "y": None}, {"x": 3}], strict=True))
    with pytest.raises(ValueError, match=r"c\.txt is neither JSON lines .* nor \.parquet"):
        list(read_records(find_sources(str(write(tmp_path / "c.txt", b"x")))))
    with pytest.raises(ValueError, match="line 1 is a JSON list, not an object; such a file"):
        list(read_records(find_sources(str(write(tmp_path / "d.jsonl", b"[1]")))))


@pytest.mark.parametrize(
    ("field", "texts"),
    [
        ("meta.text", ["in one", "in two"]),
        ("title, meta.text", ["One\n\nin one", "in two"]),  # the second has no title
        ("a.b", ["dotted", "dotted"]),
        ("x,y", ["comma", "comma"]),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_text_comes_from_nested_and_from_several_fields(tmp_path, suffix, field, texts):
    rows = [
        {"title": title, "meta": {"text": f"in {name}"}, "a.b": "dotted", "x,y": "comma"}
        for title, name in (("One", "one"), (None, "two"))
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert [text for _, text in read(path, field)] == texts


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("meta.body", r"line 1 has no field 'body' of 'meta\.body' but text; set"),
        ("title.text", r"line 1 has no field 'text' of 'title\.text' but none"),
        ("meta", r"line 1: 'meta' is dict, not text"),
        ("title,number", r"line 1: 'number' is int, not text"),
    ],
)
def test_fields_that_are_not_there_are_told(tmp_path, field, message):
    record = {"title": "t", "meta": {"text": "x"}, "number": 3}
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "a.jsonl", json.dumps(record).encode()), field)


def test_tables_of_text_are_read(tmp_path):
    write(tmp_path / "a.csv", b'\xef\xbb\xbftext,n\n"one, two",1\n')
    write(tmp_path / "b.tsv.gz", gzip.compress(b"n\ttext\n1\tthree\n"))
    table = pa.table({"text": ["four"]})
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    assert [text for _, text in read(tmp_path)] == ["one, two", "three", "four"]


def test_folder_stands_for_what_is_below_it(tmp_path):
    for name in ("b.txt", "sub/a.md", ".hidden", ".git/c.txt", "sub/__pycache__/d.txt"):
        write(tmp_path / name, b"x")
    # As the library datasets saves a data set.
    table = pa.table({"text": ["y"]})
    (tmp_path / "saved").mkdir()
    with pa.OSFile(str(tmp_path / "saved/data-00000-of-00001.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        write(tmp_path / "saved" / name, b"{\n}")
    names = [name for name, _ in read(tmp_path)]
    assert names == ["b.txt", "saved/data-00000-of-00001.arrow:1", "sub/a.md"]


def test_names_with_commas_are_found(tmp_path):
    for name in ("a,b.txt", "c.txt", "d,e,f/g.txt"):
        write(tmp_path / name, b"x")
    pattern = f"{tmp_path}/a,b.txt, {tmp_path}/c.txt,{tmp_path}/d,e,f/*.txt"
    assert [name for name, _ in read(pattern)] == ["a,b.txt", "c.txt", "g.txt"]
    parts = documents.find_parts(pattern)
    assert [len(sources) for _, sources in parts] == [1, 1, 1]
    assert [pattern for pattern, _ in parts][1] == f"{tmp_path}/c.txt"


def test_rejected_records_and_files_are_noted_and_the_others_read(tmp_path):
    write(tmp_path / "a.jsonl", b'{"text": "x"}\nbroken\n{"body": 1}\n{"text": "y"}\n')
    write(tmp_path / "b.txt", b"\xff")
    write(tmp_path / "c.jsonl.gz", CUT_GZIP)
    write(tmp_path / "d.parquet", b"plain")
    write(tmp_path / "e.txt", b"z")
    noted = []
    found = read_documents(
        find_sources(str(tmp_path)),
        rejected=lambda source, problem: noted.append((source.name, problem)),
    )
    texts = [document.text for document in found]
    assert texts[:2] == ["x", "y"] and texts[-1] == "z"
    assert [name for name, _ in noted] == ["a.jsonl", "a.jsonl", "b.txt", "c.jsonl.gz", "d.parquet"]
    assert "a.jsonl line 3 has no field 'text' but body" in noted[1][1]


def test_records_of_tables_keep_all_fields(tmp_path):
    write(tmp_path / "a.csv", b"x,y\n1,2\n")
    places = list(read_records(find_sources(str(tmp_path))))
    assert places == [(f"{tmp_path}/a.csv:1", {"x": "1", "y": "2"})]
