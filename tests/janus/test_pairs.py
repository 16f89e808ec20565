"""Pairs are read from every form, each picture where it lies, and what is wrong is named."""

import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest

from dsjax.janus.pairs import read_pairs
from dsjax.vision import pictures

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
CAPTIONS = ["a red square", "a green square", "a blue square"]


def png(number):
    file = io.BytesIO()
    PIL.Image.new("RGB", (4 + number, 3), COLOURS[number]).save(file, "PNG")
    return file.getvalue()


def in_folder(root):
    for number, caption in enumerate(CAPTIONS):
        (root / f"{number}.png").write_bytes(png(number))
        (root / f"{number}.txt").write_text(caption + "\n")
    return root


def in_lines(root):
    (root / "pictures").mkdir()
    lines = []
    for number, caption in enumerate(CAPTIONS):
        (root / "pictures" / f"{number}.png").write_bytes(png(number))
        lines.append(json.dumps({"image": f"pictures/{number}.png", "caption": caption}))
    (root / "pairs.jsonl").write_text("\n".join(lines))
    return root


def in_parquet(root, image=lambda number: {"bytes": png(number), "path": None}):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": image(n), "caption": caption} for n, caption in enumerate(CAPTIONS)]
    pq.write_table(pa.Table.from_pylist(rows), root / "pairs.parquet")
    return root / "pairs.parquet"


def in_tar(root, members=None):
    if members is None:
        members = [(f"a/{n}.PNG", png(n)) for n in range(3)]
        members += [(f"a/{n}.txt", CAPTIONS[n].encode()) for n in range(2)]
        members.append(("a/2.json", json.dumps({"caption": CAPTIONS[2]}).encode()))
        members.sort()
    with tarfile.open(root / "pairs.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return root / "pairs.tar"


def bare_bytes(root):
    return in_parquet(root, png)


def paths_in_parquet(root):
    for number in range(3):
        (root / f"{number}.png").write_bytes(png(number))
    return in_parquet(root, lambda number: f"{number}.png")


def read(where, tmp_path):
    return list(read_pairs(str(where), tmp_path / "cache", key="janus.see"))


@pytest.mark.parametrize(
    "form", [in_folder, in_lines, in_parquet, bare_bytes, paths_in_parquet, in_tar]
)
def test_pictures_and_texts_of_every_form_belong_together(form, tmp_path):
    (tmp_path / "data").mkdir()
    found = read(form(tmp_path / "data"), tmp_path)
    assert [pair.text for pair in found] == CAPTIONS
    assert [pair.question for pair in found] == [None] * 3
    for number in (2, 0, 1):  # in any order
        picture = pictures.decode(found[number].picture.read(), found[number].place)
        assert picture.size == (4 + number, 3)
        np.testing.assert_array_equal(np.asarray(picture)[0, 0], COLOURS[number])


def test_pictures_of_a_table_are_copied_once(tmp_path):
    table = in_parquet(tmp_path)
    first = read(table, tmp_path)
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns, kept.stat().st_ino
    assert read(table, tmp_path) == first
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    assert kept.read_bytes() == b"".join(map(png, range(3)))


def test_of_a_table_with_a_broken_record_no_copy_is_left(tmp_path):
    table = in_parquet(tmp_path, lambda number: png(number) if number < 2 else None)
    with pytest.raises(ValueError, match=r"pairs.parquet:3 has no picture"):
        read(table, tmp_path)
    assert not [*(tmp_path / "cache").iterdir()]


def test_questions_have_answers(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    line = {"image": "0.png", "question": "What colour?", "answer": " red ", "caption": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    (pair,) = read(tmp_path / "pairs.jsonl", tmp_path)
    assert (pair.question, pair.text) == ("What colour?", "red")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "no.png", "caption": "x"}, r"pairs.jsonl:1: there is no picture .*no.png"),
        ({"caption": "x"}, r"pairs.jsonl:1 has no picture: image.*fields are caption"),
        ({"image": "0.png", "caption": " "}, r"pairs.jsonl:1 has no text"),
        ({"image": "0.png", "question": "What?"}, r"pairs.jsonl:1 has no text"),
    ],
)
def test_record_that_is_no_pair_is_named(record, message, tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "pairs.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("lonely.png", png(0), r"lonely.png has no text beside it; write .*lonely.txt"),
        ("lonely.txt", b"a cat", r"lonely.txt has no picture of its name among .* janus.see"),
        ("notes.pdf", b"%PDF", r"notes.pdf is no picture, text"),
        ("pairs.tar", b"no tar at all", r"pairs.tar is damaged, cut short or not a plain .tar"),
    ],
)
def test_file_that_is_no_pair_is_named(name, data, message, tmp_path):
    in_folder(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.txt", b"a cat")], "pairs.tar:0 has 0 pictures among .txt, not 1"),
        ([("0.png", png(0))], "pairs.tar:0 has no .txt, .caption or .json"),
        ([("0.json", b"{"), ("0.png", png(0))], "pairs.tar:0.json is not JSON"),
        ([("0.png", png(0)), ("0.txt", b"\xff")], "pairs.tar:0.txt is not UTF-8"),
        ([("0.png", png(0)), ("0.txt", b" ")], "pairs.tar:0.txt is empty"),
    ],
)
def test_group_that_is_no_pair_is_named(members, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(in_tar(tmp_path, members), tmp_path)


def test_tar_that_shrank_is_noticed_when_its_picture_is_read(tmp_path):
    path = in_tar(tmp_path)
    last = read(path, tmp_path)[2].picture
    path.write_bytes(path.read_bytes()[: last.offset + 3])
    with pytest.raises(ValueError, match=r"pairs.tar:a/2.png is cut short"):
        last.read()


def test_nothing_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"janus.see=.* matches no file"):
        read(tmp_path / "no*.png", tmp_path)
