"""A conversion's folder: there whole or not at all, taken up again, refused where it must be."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from dsjax.checkpoint import staging
from dsjax.checkpoint.staging import (
    Staging,
    check_space,
    check_target,
    fingerprint,
    partial_folder,
)

IDENTITY = {"the source": "/models/v3", "--dtype": "keep"}


def silent(text):
    pass


def begun(target, *parts, identity=IDENTITY):
    """A conversion that has been interrupted after `parts`."""
    with Staging(target, identity, silent) as work:
        for part in parts:
            (work.content / part).write_text(part)
            work.finish(part)
    return partial_folder(target)


def test_staging_publishes_the_whole(tmp_path):
    target = tmp_path / "deep" / "v3"
    with Staging(target, IDENTITY, silent) as work:
        (work.content / "config.json").write_text("{}")
        work.finish("config")
        assert not target.exists()
        work.publish()
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert list(target.parent.iterdir()) == [target]


def test_staging_may_replace_an_empty_folder(tmp_path):
    target = tmp_path / "v3"
    target.mkdir()
    check_target(target, tmp_path / "hf")
    with Staging(target, IDENTITY, silent) as work:
        (work.content / "config.json").write_text("{}")
        work.publish()
    assert (target / "config.json").is_file()


def test_staging_goes_on_after_what_is_finished(tmp_path):
    said = []
    folder = begun(tmp_path / "v3", "a", "b")
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('"c"')  # a crash cut the line short
    with Staging(tmp_path / "v3", IDENTITY, said.append) as work:
        assert work.finished == {"a": None, "b": None}
        assert (work.content / "a").read_text() == "a"
        work.finish("d", {"size": 1})
    assert said == [f"continuing after 2 finished parts in {folder}"]
    lines = (folder / "journal.jsonl").read_text().splitlines()
    notes = [(part, None) for part in "ab"] + [("d", {"size": 1})]
    wanted = [{"part": part, "note": note} for part, note in notes]
    assert [json.loads(line) for line in lines] == [IDENTITY, *wanted]


@pytest.mark.parametrize("lost", ["content", "journal.jsonl"])
def test_staging_begins_again_when_half_of_it_is_lost(tmp_path, lost):
    folder = begun(tmp_path / "v3", "a")
    if lost == "content":
        shutil.rmtree(folder / lost)
    else:
        (folder / lost).unlink()
    with Staging(tmp_path / "v3", IDENTITY, silent) as work:
        assert work.finished == {} and list(work.content.iterdir()) == []


def test_staging_refuses_what_is_left_of_another_conversion(tmp_path):
    folder = begun(tmp_path / "v3", "a")
    changed = IDENTITY | {"--dtype": "bfloat16"}
    with pytest.raises(
        ValueError,
        match=r"v3\.partial contains .*something else: --dtype was keep, now bfloat16; delete it",
    ):
        Staging(tmp_path / "v3", changed, silent)
    assert (folder / "content" / "a").is_file()
    begun(tmp_path / "v3", "b")  # and the lock is free


def test_staging_refuses_a_second_process(tmp_path):
    code = "import sys, pathlib; from dsjax.checkpoint.staging import Staging\n"
    code += "Staging(pathlib.Path(sys.argv[1]), {}, print)"
    with Staging(tmp_path / "v3", {}, silent):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "v3")], capture_output=True, text=True
        )
    assert "v3.partial is in use by another process; wait for it" in done.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError("full")], ids=repr)
def test_staging_says_how_to_go_on(tmp_path, error):
    said = []
    with pytest.raises(type(error)):
        with Staging(tmp_path / "v3", IDENTITY, said.append) as work:
            work.finish("a")
            raise error
    assert said == [
        f"stopped with 1 finished parts in {tmp_path}/v3.partial; the same command continues from "
        "there"
    ]


def test_staging_keeps_nothing_of_what_can_only_fail_again(tmp_path):
    said = []
    with pytest.raises(ValueError, match="NaN"):
        with Staging(tmp_path / "v3", IDENTITY, said.append) as work:
            work.finish("a")
            raise ValueError("NaN")
    assert list(tmp_path.iterdir()) == [] and said == []


def test_target_inside_the_source_is_refused(tmp_path):
    for target in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(ValueError, match=r"is inside .* the folder to convert; name a folder"):
            check_target(target, tmp_path)
    check_target(tmp_path.parent / f"{tmp_path.name}-converted", tmp_path)


def test_target_that_is_taken_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="full exists and is not empty; name a new or an empty"):
        check_target(tmp_path / "full", tmp_path / "hf")
    with pytest.raises(ValueError, match="file exists and is a file; name a new or an empty"):
        check_target(tmp_path / "full" / "file", tmp_path / "hf")


def test_target_that_is_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(staging.os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(ValueError, match=r"disk is a mount point, .* name a folder inside it"):
        check_target(tmp_path / "disk", tmp_path / "hf")


def test_space_counts_what_an_interrupted_conversion_has_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    target = tmp_path / "new" / "v3"
    check_space(target, 1000)
    with pytest.raises(
        ValueError,
        match=r"v3 needs 1,500 bytes and there is room for 1,000; free 500 bytes, choose another",
    ):
        check_space(target, 1500)
    (partial_folder(target) / "content").mkdir(parents=True)
    (partial_folder(target) / "content" / "a").write_bytes(bytes(600))
    check_space(target, 1500)


def test_fingerprint_changes_with_a_file(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text(file.name)
    before = fingerprint(files)
    assert fingerprint(reversed(files)) == before
    os.utime(files[1], ns=(1, 1))
    assert fingerprint(files) != before
    assert fingerprint(files[:1]) != before
