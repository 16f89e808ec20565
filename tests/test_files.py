import errno
import os
import resource
import signal
import socket
from pathlib import Path

import pytest

from dsjax import files
from dsjax.files import (
    open_regular,
    parse,
    publish,
    read_json,
    read_regular,
    replacing,
    write,
    write_json,
)


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
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["config.json"]


def test_full_disk_leaves_the_old_file_and_is_named(tmp_path):
    """A file size limit makes the kernel refuse to write, as a full disk does."""
    path = tmp_path / "summary.json"
    write_json(path, {"loss": 1.0})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError) as error:
            write_json(path, {"text": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(path)
    assert read_json(path) == {"loss": 1.0} and os.listdir(tmp_path) == ["summary.json"]


def test_file_is_on_the_disk_before_it_takes_its_name_and_the_name_after(tmp_path, monkeypatch):
    """What makes a crash at any point leave the old file or the new one, whole."""
    calls, path = [], tmp_path / "a"
    write(path, "old")
    fsync = os.fsync

    def seen(descriptor):
        fsync(descriptor)
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append((os.path.basename(target), path.read_text()))

    monkeypatch.setattr(os, "fsync", seen)
    write(path, b"new")
    assert calls == [("a.partial", "old"), (tmp_path.name, "new")]


def test_a_file_that_cannot_be_written_is_refused_beforehand(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "new.json")
    files.check_writable(Path("/dev/null"))
    with pytest.raises(ValueError, match="is a folder; name a file to write"):
        files.check_writable(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*absent; make it"):
        files.check_writable(tmp_path / "absent" / "new.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="is read-only; choose another folder"):
        files.check_writable(tmp_path / "new.json")


def test_device_is_written_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", {"a": 1})
    assert os.read(descriptor, 99) == b'{\n  "a": 1\n}\n'
    os.close(descriptor)
    assert os.listdir(tmp_path) == ["pipe"]


def test_name_that_is_not_utf_8_is_written_and_read(tmp_path):
    values = {"files": os.fsdecode(b"caf\xe9/*.txt")}
    write_json(tmp_path / "config.json", values)
    assert read_json(tmp_path / "config.json") == values


def test_numbers_that_are_not_finite_become_null_at_any_depth():
    nan, inf = float("nan"), float("inf")
    values = {"loss": nan, "step": 3, "inner": {"worst": -inf, "each": [1.5, (inf, "nan")]}}
    wanted = {"loss": None, "step": 3, "inner": {"worst": None, "each": [1.5, [None, "nan"]]}}
    assert files.finite(values) == wanted


def test_published_folder_has_its_name_and_its_folders_synced(tmp_path, monkeypatch):
    (tmp_path / "work/inner").mkdir(parents=True)
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    publish(tmp_path / "work", tmp_path / "whole")
    assert os.listdir(tmp_path) == ["whole"]
    assert synced == [tmp_path / "work", tmp_path / "work/inner", tmp_path]


def test_writing_names_the_path_of_a_full_disk(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(OSError) as error_info, files.writing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error_info.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as error_info, files.writing("elsewhere"):
        open(path)
    assert error_info.value.filename == str(path)


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
    with pytest.raises(ValueError, match=r"config\.json does not exist; check its name"):
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


def test_many_problems_are_cut_in_the_message():
    assert files.listed(["a", "b"]) == "a; b"
    many = files.listed([str(n) for n in range(1234)])
    assert many == "0; 1; 2; and 1,231 more such (1,234 in all)"


def test_message_has_a_line_for_each_kind_of_problem_however_many_there_are():
    problems = [f"missing model.layers.{n}.a_proj.weight [{n}, 64]" for n in range(64)]
    problems += ["missing model.b.weight_scale_inv, the scales of an FP8 weight"]
    problems += [f"unexpected 'model.{n}' int8[3]" for n in range(9)]
    first, second, third = (
        "missing model.layers.0.a_proj.weight [0, 64]; missing model.layers.1.a_proj.weight "
        "[1, 64]; missing model.layers.2.a_proj.weight [2, 64]; and 61 more such (64 in all)",
        problems[64],
        "unexpected 'model.0' int8[3]; unexpected 'model.1' int8[3]; unexpected 'model.2' "
        "int8[3]; and 6 more such (9 in all)",
    )
    assert files.listed(problems) == f"{first}; {second}; {third}"
    long = [f"model-{n}.safetensors is " + "far too long " * 20 for n in range(163)]
    assert files.listed(long).endswith(
        "; the same of model-1.safetensors; the same of model-2.safetensors; and 160 more such "
        "(163 in all)"
    )
    lines = [f"p.jsonl:{n}: " + "far too long " * 20 for n in (2, 3, 7)]
    assert files.listed(lines).endswith("; the same of p.jsonl:3; the same of p.jsonl:7")
    kinds = ["kind " + "x" * n for n in range(100)]
    assert files.listed(kinds).endswith("; and problems of 80 more kinds")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page"),
        (b"<HTML><body>404", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a web page"),
        (b"PK\x03\x04\x00\x00", "a zip archive, as torch.save writes"),
        (b"\x80\x02}q\x00", "a pickle"),
        (b"\x80\x04\x95", "a pickle"),
        (b"GGUF\x03\x00", "a GGUF file"),
        (b"\x1f\x8b\x08", "compressed by gzip"),
        (b'{"error":"Repository not found"}', "a server's message"),
        (b"Entry not found", "a server's message"),
    ],
)
def test_file_that_is_not_what_its_name_says_is_named(tmp_path, data, what):
    assert str(files.disguise(data)).startswith(what)
    path = tmp_path / "config.json"
    path.write_bytes(data)
    if not data.startswith(b"{"):
        with pytest.raises(ValueError, match=f"config.json is {what}"):
            read_json(path)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"model_type": "llama"}', b"\x80\x00", b"hello"])
def test_file_that_could_be_anything_is_not_named(data):
    assert files.disguise(data) is None


def test_cache_lies_in_the_users_cache_folder_or_the_chosen_one(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(files.cache_folder("")) == "/x/dsjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert str(files.cache_folder("")) == "/h/.cache/dsjax"
    assert str(files.cache_folder("~/d")) == "/h/d"
    assert str(files.cache_folder("d")) == f"{os.getcwd()}/d"
