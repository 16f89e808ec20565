import os
import socket

import pytest

from dsjax import files
from dsjax.files import open_regular, parse, read_json, read_regular, write_json


def test_object_is_read_as_written(tmp_path):
    path = tmp_path / "config.json"
    values = {"a": [1, 2.5, None, True, "\u6df1"], "b": {"c": {}}}
    write_json(path, values)
    assert read_json(path) == values
    assert os.listdir(tmp_path) == ["config.json"]
    assert "\u6df1" in path.read_text(encoding="utf-8")


def test_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "b": 2, "a": 1}', r"^x\.json has the key 'a' twice in one object$"),
        (b'{"o": {"a": 1, "a": 1}}', r"has the key 'a' twice"),
        (b'{"a": NaN}', r"has the number NaN, which is not finite"),
        (b'{"a": [-Infinity]}', r"has the number -Infinity, which is not finite"),
        (b'{"a": 1e999}', r"has the number 1e999, which is not finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"has a number that cannot be read"),
        (b'{"a": "\xff"}', r"is not UTF-8 text: invalid start byte at byte 7"),
        (b'\xef\xbb\xbf{"a": 1}', r"is not JSON"),
        (b'{"a": 1', r"is not JSON: .* at line 1 column 8"),
        (b'{"a": 1} {}', r"is not JSON: Extra data"),
        (b"", r"is not JSON"),
        (b"[" * 100_000, r"nests deeper than 64 levels"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, r"nests deeper than 64 levels"),
        (b"[" * 66 + b"]" * 66, r"nests deeper than 64 levels"),
    ],
    ids=lambda value: value[:20].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_what_loaders_disagree_about_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse(data, "x.json")


def test_deepest_allowed_nesting_is_read():
    parse(b"[" * 65 + b"]" * 65, "x.json")


def test_long_key_is_cut_in_the_message():
    key = b"k" * 10_000
    with pytest.raises(ValueError) as failure:
        parse(b'{"' + key + b'":1,"' + key + b'":1}', "x.json")
    assert len(str(failure.value)) < 200


def test_array_is_no_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json holds a JSON list, not an object"):
        read_json(path)


def test_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(10**12)  # sparse: a terabyte on paper
    with pytest.raises(ValueError, match=r"has 1,000,000,000,000 bytes, more than the 67,108,864"):
        read_json(path)


def test_missing_file_and_dangling_link_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist; download"):
        read_json(tmp_path / "config.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"link\.json is a link to nothing"):
        read_json(tmp_path / "link.json")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        for name in ("fifo", "folder", "socket", "zero"):
            with pytest.raises(ValueError, match=f"{name} is not a regular file"):
                open_regular(tmp_path / name)


def test_fifo_that_takes_a_files_place_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "late")
    (tmp_path / "early").write_text("{}")
    regular = os.stat(tmp_path / "early")
    monkeypatch.setattr(files.os, "stat", lambda path: regular)
    with pytest.raises(ValueError, match="late is not a regular file"):
        open_regular(tmp_path / "late")


def test_link_to_a_regular_file_is_followed(tmp_path):
    """The Hugging Face cache keeps snapshots as links into ../../blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(b"abc")
    (tmp_path / "config.json").symlink_to("blobs/0123")
    assert read_regular(tmp_path / "config.json", 3) == b"abc"
    with pytest.raises(ValueError, match="has 3 bytes, more than the 2 allowed"):
        read_regular(tmp_path / "config.json", 2)


def test_name_with_a_null_byte_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: embedded null byte"):
        open_regular(tmp_path / "a\0b")
