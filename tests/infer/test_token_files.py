"""Arrays in and out: what is no array of ids is refused by name, and nothing half-written stays."""

import os
import threading

import numpy as np
import pytest

from dsjax.infer import token_files
from dsjax.infer.token_files import ArrayWriter


def saved(path, array):
    np.save(path, array, allow_pickle=True)
    return path


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, ">i8"])
def test_tokens_of_any_integer_type_are_read(tmp_path, dtype):
    path = saved(tmp_path / "T.npy", np.array([[0, 5], [9, 1]], dtype))
    tokens = token_files.read_tokens(path, 10, max_length=3)
    assert tokens.dtype == np.int32 and tokens.tolist() == [[0, 5], [9, 1]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), np.float32), r"holds float32 of shape \(2, 3\); token ids are integers"),
        (np.zeros((2, 3), bool), "holds bool of shape"),
        (np.zeros(3, np.int32), r"holds int32 of shape \(3,\)"),
        (np.zeros((0, 3), np.int32), r"of shape \(0, 3\)"),
        (
            np.array([[0, 10, 3], [4, -1, 10]]),
            r"token \[0, 1\] is 10, one of 3 ids outside .* 0 to",
        ),
        (
            np.zeros((1, 4), np.int32),
            r"rows of 4 tokens exceed the model's context of 3 .*; cut them into",
        ),
        (np.array([[2**63 + 1]], np.uint64), r"token \[0, 0\] is 9223372036854775809, one of 1"),
        (np.array([[{}]], object), r"is not a \.npy file of token ids \(Object arrays cannot be"),
    ],
)
def test_tokens_reject_what_is_no_array_of_ids(tmp_path, array, message):
    path = saved(tmp_path / "T.npy", array)
    with pytest.raises(ValueError, match=rf"T\.npy.*{message}"):
        token_files.read_tokens(path, 10, max_length=3)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"text", None])
def test_tokens_reject_other_files(tmp_path, content):
    path = saved(tmp_path / "T.npy", np.zeros((4, 4), np.int32))
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ValueError, match=r"T\.npy is not a \.npy file of token ids .*numpy\.save"):
        token_files.read_tokens(path, 10, max_length=3)


def test_writer_writes_what_numpy_reads(tmp_path):
    path = tmp_path / "L.npy"
    path.write_text("what was there before")
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with ArrayWriter(path, array.shape, array.dtype) as writer:
        writer.write(array[0, :2])
        writer.write(array[0, 2:])
        assert path.read_text() == "what was there before"
        writer.write(array[1])
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), array)
    assert os.listdir(tmp_path) == ["L.npy"]


def test_writer_leaves_nothing_of_a_failure(tmp_path):
    path = tmp_path / "L.npy"
    path.write_text("what was there before")
    with pytest.raises(KeyboardInterrupt), ArrayWriter(path, (2,), np.dtype(np.int32)) as writer:
        writer.write(np.zeros(1, np.int32))
        raise KeyboardInterrupt
    assert path.read_text() == "what was there before" and os.listdir(tmp_path) == ["L.npy"]


def test_outputs_are_checked_before_the_work(tmp_path):
    source, out = tmp_path / "T.npy", tmp_path / "L.npy"
    token_files.check_outputs([out, None, tmp_path / "M.npy"], source)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        token_files.check_outputs([tmp_path], source)
    with pytest.raises(ValueError, match=r"there is no folder .*absent; make it"):
        token_files.check_outputs([tmp_path / "absent" / "L.npy"], source)
    for named in ([out, out], [source], [None, tmp_path / "." / "T.npy"]):
        with pytest.raises(ValueError, match="is named twice, among the files to read and"):
            token_files.check_outputs(named, source)


def test_outputs_reject_a_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match="is read-only; choose another folder"):
        token_files.check_outputs([tmp_path / "L.npy"], tmp_path / "T.npy")


def test_an_array_may_come_through_a_pipe(tmp_path):
    tokens = np.arange(6).reshape(2, 3)
    np.save(tmp_path / "T.npy", tokens)
    os.mkfifo(tmp_path / "pipe")
    data = (tmp_path / "T.npy").read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[data])
    writer.start()
    found = token_files.read_tokens(tmp_path / "pipe", 9, max_length=3)
    writer.join()
    np.testing.assert_array_equal(found, tokens)
