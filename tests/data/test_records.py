"""Records of every kind of file, and what becomes of broken ones."""

import csv
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsjax.data import records

ROWS = [
    {"id": 1, "text": 'a,\n"b" \u00fc'},
    {"id": 2, "text": ""},
    {"id": 3, "text": "x" * 200_000},
]


def written(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return str(path)


def delimited(rows, delimiter):
    output = io.StringIO(newline="")
    writer = csv.DictWriter(output, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue().encode()


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.TSV", "\t")])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_rows_have_the_headers_names(tmp_path, name, delimiter, mark):
    path = written(tmp_path, name, mark + delimited(ROWS, delimiter))
    want = [(index, {"id": str(row["id"]), "text": row["text"]}) for index, row in enumerate(ROWS)]
    assert list(records.csv_rows(path)) == want


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'a,b\n1,"2\n', r"a\.csv line 3 is not CSV in UTF-8 \(unexpected end of data\)"),
        (b"a,b\n1,\xff\n", r"is not CSV in UTF-8 \('utf-8' codec"),
        (b"a,b\n1,2,3\n", r"a\.csv line 2 has 3 fields and the header 2; quote"),
    ],
)
def test_bad_csv_is_told(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        list(records.csv_rows(written(tmp_path, "a.csv", data)))


def arrow_stream(path, table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def arrow_file(path, table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", lambda path, table: pq.write_table(table, path)),
        ("a.arrow", arrow_stream),
        ("b.arrow", arrow_file),
    ],
)
@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_table_rows_come_from_the_chosen_columns(tmp_path, name, write, type_):
    texts = pa.array([row["text"] for row in ROWS]).cast(type_)
    write(tmp_path / name, pa.table({"id": [1, 2, 3], "text": texts}))
    path, asked = str(tmp_path / name), []
    assert [row for _, row in records.table_rows(path)] == ROWS
    chosen = records.table_rows(path, lambda there: asked.append(list(there)) or ["text"])
    assert list(chosen) == [(index, {"text": row["text"]}) for index, row in enumerate(ROWS)]
    assert asked == [["id", "text"]]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_bad_table_is_told(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} is not a readable (parquet|Arrow) file"):
        list(records.table_rows(written(tmp_path, name, b"plain" * 9)))


LINES = b'\xef\xbb\xbf{"x": 1}\n{"x": \n\n[2]\n{"x": "\xff"}\n{"x": 3}\n'


def test_rejected_lines_are_noted_and_the_others_read(tmp_path):
    path, problems = written(tmp_path, "a.jsonl", LINES), []
    assert list(records.json_lines(path, problems.append)) == [(0, {"x": 1}), (5, {"x": 3})]
    assert [problem.partition(" ")[2][:24] for problem in problems] == [
        "line 2 is not JSON (Expe", "line 4 is a JSON list, n", "is not UTF-8: byte 31 (l",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 is not JSON"):
        list(records.json_lines(path))


def test_rejected_rows_are_noted_and_the_others_read(tmp_path):
    path, problems = written(tmp_path, "a.csv", b"a,b\n1,2\n3\n4,5\n"), []
    read = list(records.csv_rows(path, problems.append))
    assert read == [(0, {"a": "1", "b": "2"}), (2, {"a": "4", "b": "5"})] and len(problems) == 1


def test_byte_order_mark_is_dropped_and_that_of_utf16_told():
    assert records.decode(b"\xef\xbb\xbfx", "a") == "x"
    assert records.decode(b"\xef\xbb\xbfx", "a", offset=3) == "\ufeffx"
    with pytest.raises(ValueError, match=r"byte 0 is 0xff; convert it \(iconv -f UTF-16 -t UTF-8"):
        records.decode("x".encode("utf-16"), "a")
    with pytest.raises(ValueError, match=r"byte 4 is 0xff"):
        records.decode(b"\xef\xbb\xbfx\xff", "a")
