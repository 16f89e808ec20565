import json
import os
import random
import struct
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoint import tensor_files
from dsjax.checkpoint.tensor_files import (
    open_folder,
    plan_shards,
    read_header,
    write_index,
    write_shard,
)

INDEX = "model.safetensors.index.json"
DTYPES = (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int64, np.float16, np.bool_)


def raw(header, data=b"", length=None):
    """A safetensors file of this header (an object or its text) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=None, dtype="U8"):
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def arrays():
    rng = np.random.default_rng(0)
    shapes = ((3, 5), (7,), (4, 3), (), (0, 5), (2, 1, 3))
    return {
        f"layer.{number}.weight": rng.normal(size=shape).astype(dtype)
        for number, (dtype, shape) in enumerate(zip(DTYPES, shapes, strict=True))
    }


def save(folder, tensors, max_bytes=10**9):
    folder.mkdir(exist_ok=True)
    shards = plan_shards(
        ((name, array.dtype, array.shape) for name, array in tensors.items()), max_bytes
    )
    for shard in shards:
        write_shard(folder, shard, tensors.__getitem__)
    write_index(folder, shards)
    return shards


def assert_same(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("max_bytes", [10**9, 30, 1])
def test_files_hold_what_was_written(tmp_path, max_bytes):
    tensors = arrays()
    shards = save(tmp_path, tensors, max_bytes)
    folder = open_folder(tmp_path)
    assert list(folder.tensors.keys() ^ tensors.keys()) == []
    assert len(folder.files) == len(shards) == {10**9: 1, 30: 3, 1: 6}[max_bytes]
    for name, array in tensors.items():
        got = folder.read(name)
        assert_same(got, array)
        assert got.flags.owndata or got.base.flags.owndata
        assert got.flags.writeable


@pytest.mark.parametrize("max_bytes", [10**9, 30])
def test_files_are_read_by_the_safetensors_library(tmp_path, max_bytes):
    tensors = arrays()
    for shard in save(tmp_path, tensors, max_bytes):
        with safetensors.safe_open(tmp_path / shard.file_name, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {tensor.name for tensor in shard.tensors}
        content = (tmp_path / shard.file_name).read_bytes()
        for name, held in safetensors.deserialize(content):
            assert held["shape"] == list(tensors[name].shape)
            assert bytes(held["data"]) == tensors[name].tobytes()
        for tensor in shard.tensors:
            assert tensor.offset % max(tensor.dtype.itemsize, 1) == 0
            at = slice(tensor.offset, tensor.offset + tensor.n_bytes)
            assert content[at] == tensors[tensor.name].tobytes()
    if max_bytes == 30:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"] == {"total_size": sum(a.nbytes for a in tensors.values())}
        assert index["weight_map"].keys() == tensors.keys()
        assert sorted(os.listdir(tmp_path)) == [
            *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
            INDEX,
        ]
    else:
        assert os.listdir(tmp_path) == ["model.safetensors"]


def test_shards_keep_order_and_size():
    sizes = [4, 4, 4, 9, 1, 1]
    named = [(f"t{n}", np.dtype(np.uint8), (size,)) for n, size in enumerate(sizes)]
    groups = [[t.name for t in shard.tensors] for shard in plan_shards(named, 8)]
    assert groups == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]


def test_rows_are_read_alone(tmp_path, monkeypatch):
    tensors = {"w": np.arange(40, dtype=np.int32).reshape(10, 4), "e": np.zeros((0, 3), np.int8)}
    save(tmp_path, tensors)
    folder = open_folder(tmp_path)
    read = []
    plain = os.preadv

    def counted(descriptor, buffers, offset):
        read.append(sum(len(buffer) for buffer in buffers))
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(tensor_files.os, "preadv", counted)
    assert_same(folder.read("w", slice(3, 5)), tensors["w"][3:5])
    assert read == [32]
    for rows in (slice(None), slice(-2, None), slice(4, 4), slice(9, 2), slice(5, 99)):
        assert_same(folder.read("w", rows), tensors["w"][rows])
    assert_same(folder.read("e", slice(0, 2)), tensors["e"])


def test_short_reads_are_continued(tmp_path, monkeypatch):
    tensors = {"w": np.arange(1000, dtype=np.int32)}
    save(tmp_path, tensors)
    folder = open_folder(tmp_path)
    plain = os.preadv
    monkeypatch.setattr(
        tensor_files.os, "preadv", lambda fd, buffers, at: plain(fd, [buffers[0][:7]], at)
    )
    assert_same(folder.read("w"), tensors["w"])


def test_threads_read_at_the_same_time(tmp_path):
    tensors = {f"t{n}": np.full((500, 20), n, np.int32) for n in range(8)}
    save(tmp_path, tensors, 10**5)
    folder = open_folder(tmp_path)
    wrong = []

    def check(name):
        for _ in range(20):
            if not np.array_equal(folder.read(name), tensors[name]):
                wrong.append(name)

    threads = [threading.Thread(target=check, args=(name,)) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_file_that_changes_while_in_use_is_named(tmp_path, monkeypatch):
    save(tmp_path, {"w": np.zeros(100, np.int32)})
    folder = open_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 4)
    with pytest.raises(ValueError, match=r"model\.safetensors has changed its length while in use"):
        folder.read("w")
    monkeypatch.setattr(folder, "_sizes", {file: size - 4})
    with pytest.raises(ValueError, match=r"model\.safetensors ended at byte \d+, 4 bytes early"):
        folder.read("w")


HOSTILE = {
    "empty file": (b"", r"has 0 bytes, too few"),
    "seven bytes": (b"\0" * 7, r"has 7 bytes, too few"),
    "length 2^62": (raw({}, length=2**62), r"claims a header of 4,611,686,018,427,387,904 bytes"),
    "length over the cap": (raw({}, length=17_000_000), r"claims a header of 17,000,000 bytes"),
    "big-endian length": (struct.pack(">Q", 2) + b"{}", r"claims a header of 144,115,188"),
    "length past the end": (
        raw({}, length=200),
        r"is truncated: its header should end at byte 208",
    ),
    "empty header": (raw(b""), r"does not start with '\{'"),
    "leading space": (raw(b" {}"), r"does not start with '\{'"),
    "array": (raw(b"[]"), r"does not start with '\{'"),
    "not UTF-8": (raw(b'{"\xff": 1}'), r"the header is not UTF-8"),
    "not JSON": (raw(b"{'a': 1}"), r"the header is not JSON"),
    "deep": (raw(b'{"a":' + b"[" * 200_000), r"the header nests deeper"),
    "duplicate tensor": (
        raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'),
        r"has the key 'a' twice",
    ),
    "duplicate field": (
        raw(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
        r"has the key 'dtype' twice",
    ),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), r"__metadata__ must map strings"),
    "half a surrogate pair": (raw({"__metadata__": {"a": "\ud800"}}), r"half a surrogate pair"),
    "metadata a list": (raw({"__metadata__": ["a"]}), r"__metadata__ must map strings"),
    "entry not an object": (raw({"a": 1}), r"tensor 'a' must have exactly dtype, shape and data_"),
    "field too many": (raw({"a": entry(0, 0) | {"x": 1}}), r"must have exactly dtype, shape"),
    "field missing": (raw({"a": {"dtype": "U8", "shape": []}}), r"must have exactly dtype"),
    "unknown dtype": (raw({"a": entry(0, 4, [4], "Q4")}, b"0" * 4), r"has dtype 'Q4', only BOOL"),
    "sub-byte dtype": (raw({"a": entry(0, 4, [8], "F4")}, b"0" * 4), r"has dtype 'F4', only"),
    "dtype not a string": (raw({"a": entry(0, 0, [0], ["U8"])}), r"has dtype .*, only"),
    "negative dim": (raw({"a": entry(0, 4, [-2, -2])}, b"0" * 4), r"that are not negative"),
    "dim a float": (raw({"a": entry(0, 4, [4.0])}, b"0" * 4), r"must be lists of integers"),
    "dim a bool": (raw({"a": entry(0, 1, [True])}, b"0"), r"must be lists of integers"),
    "dim a string": (raw({"a": entry(0, 4, ["4"])}, b"0" * 4), r"must be lists of integers"),
    "shape not a list": (raw({"a": entry(0, 4, 4)}, b"0" * 4), r"must be lists of integers"),
    "33 dims": (raw({"a": entry(0, 1, [1] * 33)}, b"0"), r"must be lists of integers"),
    "shape larger than bytes": (
        raw({"a": entry(0, 16, [1024], "F32")}, b"0" * 16),
        r"tensor 'a' of shape \[1024\] and dtype F32 does not fill its bytes 0 to 16",
    ),
    "overflowing shape": (
        raw({"a": entry(0, 8, [2**62, 4, 2**62])}, b"0" * 8),
        r"does not fill its bytes",
    ),
    "zero times 2^62": (raw({"a": entry(0, 8, [0, 2**62])}, b"0" * 8), r"does not fill its bytes"),
    "negative offsets": (
        raw({"a": {"dtype": "U8", "shape": [16], "data_offsets": [-16, 0]}}, b"0" * 16),
        r"that are not negative",
    ),
    "reversed offsets": (
        raw({"a": {"dtype": "U8", "shape": [16], "data_offsets": [16, 0]}}, b"0" * 16),
        r"does not fill its bytes 16 to 0",
    ),
    "three offsets": (
        raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"0"),
        r"must be lists of integers",
    ),
    "overlap": (
        raw({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12),
        r"tensor 'b' at byte 4 overlaps",
    ),
    "same bytes twice": (raw({"a": entry(0, 8), "b": entry(0, 8)}, b"0" * 8), r"overlaps"),
    "hole": (
        raw({"a": entry(0, 4), "b": entry(8, 12)}, b"0" * 12),
        r"tensor 'b' at byte 8 leaves a hole before it",
    ),
    "hole at the start": (raw({"a": entry(4, 8)}, b"0" * 8), r"at byte 4 leaves a hole"),
    "trailing bytes": (raw({"a": entry(0, 4)}, b"0" * 5), r"has bytes after its last tensor"),
    "data missing": (
        raw({"a": entry(0, 400)}, b"0" * 4),
        r"is truncated: it should have \d+ bytes and has \d+; download it again",
    ),
    "name with a null": (raw({"a\0b": entry(0, 0)}), r"tensor name 'a\\x00b' is empty, longer"),
    "name with a newline": (raw({"a\nb": entry(0, 0)}), r"tensor name 'a\\nb' is empty, longer"),
    "name a lone surrogate": (raw(b'{"\\ud800": {}}'), r"tensor name '\\ud800' is empty"),
    "name empty": (raw({"": entry(0, 0)}), r"tensor name '' is empty"),
    "name of 10,000": (raw({"a" * 10_000: entry(0, 0)}), r"is empty, longer than 512"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as failure:
        open_folder(tmp_path)
    assert "model.safetensors" in str(failure.value) and len(str(failure.value)) < 700


def test_sparse_terabyte_is_refused_by_its_header(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw({"a": entry(0, 4)}, b"0" * 4))
    os.truncate(file, 10**12)
    with pytest.raises(ValueError, match=r"has bytes after its last tensor"):
        open_folder(tmp_path)


def test_file_that_is_none_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a regular file"):
        open_folder(tmp_path)


def test_tensor_name_is_never_a_path(tmp_path):
    save(tmp_path / "in", {"../../escape": np.zeros(3, np.int8)})
    assert_same(open_folder(tmp_path / "in").read("../../escape"), np.zeros(3, np.int8))
    assert os.listdir(tmp_path) == ["in"]


def test_header_in_any_order_is_read(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(
        raw({"b": entry(2, 4), "z": entry(2, 2), "a": entry(0, 2), "__metadata__": {}}, b"abcd")
    )
    folder = open_folder(tmp_path)
    assert folder.read("a").tobytes() == b"ab" and folder.read("b").tobytes() == b"cd"


def index(folder, weight_map, **more):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map} | more))


@pytest.fixture
def two_files(tmp_path):
    tensors = {name: np.zeros(4, np.int8) for name in ("a", "b")}
    save(tmp_path, tensors, 4)
    return tmp_path


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": "/etc/passwd"}, r"names '/etc/passwd', which is not the plain name"),
        ({"a": FIRST, "b": f"../{SECOND}"}, r"names '\.\./model.*not the plain name"),
        ({"a": FIRST, "b": f"./{SECOND}"}, r"names '\./model.*not the plain name"),
        ({"a": FIRST, "b": f"sub\\{SECOND}"}, r"not the plain name"),
        ({"a": FIRST, "b": "x.bin"}, r"names 'x\.bin', which is not the plain name"),
        ({"a": FIRST, "b": SECOND.upper()}, r"names 'MODEL-00002.*not the plain name"),
        ({"a": FIRST, "b": "a\0.safetensors"}, r"names 'a\\x00\.safetensors', which is not"),
        ({"a": FIRST, "b": 2}, r"names '2', which is not the plain name"),
        ({"a": FIRST, "b": [SECOND]}, r"not the plain name"),
        ({"a": FIRST, "b": "model-3.safetensors"}, r"model-3\.safetensors is missing; download it"),
        ({"a": FIRST}, r"model-00002-of-00002\.safetensors is not in model"),
        ({"a": FIRST, "b": FIRST}, r"has tensor 'b' in model-00001.*does not hold it"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, r"has tensor 'c' in .*does not hold it"),
        (
            {"x": FIRST, "b": SECOND},
            r"tensor 'a' of model-00001.* is not in model\.safetensors\.ind",
        ),
        ({}, r"has no weight_map"),
        ([], r"has no weight_map"),
    ],
)
def test_index_that_disagrees_is_refused(two_files, weight_map, message):
    index(two_files, weight_map)
    with pytest.raises(ValueError, match=message):
        open_folder(two_files)


def test_index_with_a_duplicate_key_is_refused(two_files):
    (two_files / INDEX).write_text(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}')
    with pytest.raises(ValueError, match=r"has the key 'a' twice in one object"):
        open_folder(two_files)


def test_tensor_in_two_files_is_refused(two_files):
    (two_files / SECOND).write_bytes((two_files / FIRST).read_bytes())
    with pytest.raises(ValueError, match=f"tensor 'a' is in both {FIRST} and {SECOND}"):
        open_folder(two_files)


def test_several_files_need_an_index(two_files):
    (two_files / INDEX).unlink()
    with pytest.raises(
        ValueError, match=r"there are 2 \.safetensors files but no model\.safe.*index"
    ):
        open_folder(two_files)


def test_all_problems_are_listed_together(tmp_path):
    save(tmp_path, {f"t{number}": np.zeros(4, np.int8) for number in range(40)}, 4)
    names = sorted(tmp_path.glob("*.safetensors"))
    for name in names[:5]:
        name.unlink()
    names[5].write_bytes(b"")
    with pytest.raises(ValueError) as failure:
        open_folder(tmp_path)
    message = str(failure.value)
    assert (
        message.count("is missing; download it") == 3
        and "(5 in all)" in message
        and "has 0 bytes" in message
    )
    for name in names[:30]:
        name.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"; and 27 more such \(30 in all\)$"):
        open_folder(tmp_path)


def test_linked_files_of_the_cache_are_read(tmp_path, two_files):
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in (FIRST, SECOND, INDEX):
        (snapshot / name).symlink_to(two_files / name)
    assert open_folder(snapshot).tensors.keys() == {"a", "b"}
    (two_files / FIRST).unlink()
    with pytest.raises(ValueError, match=f"{FIRST} is a link to nothing"):
        open_folder(snapshot)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.pkl",
        "model.ckpt", "__0_0.distcp",
    ],
)  # fmt: skip
def test_pickled_weights_are_refused_unread(tmp_path, name):
    canary = tmp_path / "ran"
    (tmp_path / name).write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(
        ValueError, match=rf"{name}, in Python's pickle format. Reading a pickle runs code.*saf"
    ):
        open_folder(tmp_path)
    assert not canary.exists()


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no \.safetensors files; download the weights"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere is not a folder of safetensors files"):
        open_folder(tmp_path / "nowhere")


def test_write_that_fails_leaves_nothing(tmp_path):
    tensors = {name: np.zeros(4, np.int8) for name in ("a", "b")}
    (shard,) = plan_shards((name, array.dtype, array.shape) for name, array in tensors.items())

    def produce(name):
        if name == "b":
            assert os.listdir(tmp_path) == ["model.safetensors.partial"]
            raise KeyboardInterrupt
        return tensors[name]

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, shard, produce)
    assert os.listdir(tmp_path) == []


def test_transposed_array_is_written_in_its_own_order(tmp_path):
    array = np.arange(12, dtype=np.int16).reshape(3, 4).T
    save(tmp_path, {"w": array})
    assert_same(open_folder(tmp_path).read("w"), np.ascontiguousarray(array))


def test_wrong_array_is_not_written(tmp_path):
    (shard,) = plan_shards([("w", np.dtype(np.float32), (2, 3))])
    with pytest.raises(AssertionError, match=r"w is float32\[3, 2\], planned as float32\[2, 3\]"):
        write_shard(tmp_path, shard, lambda name: np.zeros((3, 2), np.float32))


def test_many_tensors_open_in_linear_time(tmp_path):
    """V3's 92,000 tensors take seconds; a tenth of them here, in one file and in reverse."""
    header = {f"model.layers.{n}.weight": entry(n, n + 1) for n in reversed(range(9_000))}
    (tmp_path / "model.safetensors").write_bytes(raw(header, b"0" * 9_000))
    assert len(open_folder(tmp_path).tensors) == 9_000


VALID = raw(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": entry(0, 8, [2, 2], "BF16"),
        "b.weight": entry(8, 20, [3], "F32"),
    },
    bytes(range(20)),
)
PIECES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"1e999", b"NaN", b"null", b"9" * 30]
PIECES += [b"\0", b"\xff", b'"a.weight"', b'"shape"', b"true", b"4.0", b"\\ud800", b" "]


@st.composite
def mutated(draw):
    """A valid file with bytes changed, put in, taken out; its length field often kept right."""
    header, data = bytearray(VALID[8:-20]), VALID[-20:]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(header)))
        end = min(len(header), at + draw(st.integers(0, 6)))
        header[at:end] = draw(st.sampled_from(PIECES) | st.binary(max_size=4))
    length = draw(st.none() | st.integers(0, 2**64 - 1))
    data = data[: draw(st.integers(0, 20))] if draw(st.booleans()) else data
    return raw(bytes(header), data, length)


@settings(max_examples=400, deadline=None)
@given(content=mutated())
def test_mutated_file_is_read_right_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    file.write_bytes(content)
    try:
        tensors, size = read_header(file)
    except ValueError as error:
        assert str(file) in str(error)
        return
    assert size == len(content)
    assert sum(tensor.n_bytes for tensor in tensors.values()) <= len(content)
    safetensors.deserialize(content)  # whatever passes here passes there


def test_random_valid_files_are_read_right(tmp_path):
    rng = random.Random(0)
    for _ in range(20):
        tensors = {
            f"t{n}": np.zeros([rng.randrange(4) for _ in range(rng.randrange(4))], DTYPES[n % 6])
            for n in range(rng.randrange(1, 8))
        }
        for old in tmp_path.iterdir():
            old.unlink()
        save(tmp_path, tensors, rng.randrange(1, 200))
        folder = open_folder(tmp_path)
        for name, array in tensors.items():
            assert_same(folder.read(name), array)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><title>Sign in</title></html>", "a web page"),
        (b"PK\x03\x04" + bytes(30), "a zip archive, as torch.save writes"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00aq", "a pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(30), "a GGUF file"),
        (b"Entry not found", "a server's message"),
    ],
)
def test_shard_that_is_something_else_is_named(tmp_path, data, what):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"model\.safetensors is .*{what}"):
        open_folder(tmp_path)


def test_lengths_that_look_like_another_format_are_read(tmp_path):
    """A header of 0x280 bytes starts as a pickle does, one of 60 as a web page."""
    for number, length in enumerate((0x280, 60)):
        header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        header += b" " * (length - len(header))
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\7")
        assert open_folder(folder).read("a").tolist() == [7]


def test_tensors_are_compared_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_COMPARED_TOGETHER", 32)
    tensor = np.arange(40, dtype=np.float32).reshape(10, 4)
    nan = np.full_like(tensor, np.nan)
    other = tensor.copy()
    other[9, 3] += 1
    held = {"a": tensor, "same": tensor, "half": tensor.astype(np.float16), "other": other}
    save(tmp_path, held | {"nan": nan, "nan too": nan, "flat": tensor.reshape(-1)})
    folder = open_folder(tmp_path)
    assert (
        folder.equal("a", "same") and folder.equal("a", "half") and folder.equal("nan", "nan too")
    )
    assert not any(folder.equal("a", name) for name in ("other", "nan", "flat"))
