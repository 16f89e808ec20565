"""Page files: what is found again, what makes room, and what a failing or damaged disk does."""

import logging
import os
import stat
import threading

import pytest

from dsjax.generate.page_files import PageFiles

TEXT = tuple(range(40))


def opened(folder, n_bytes=10**6, fingerprint="w"):
    return PageFiles(folder, n_bytes=n_bytes, fingerprint=fingerprint)


def write(files, names, payloads):
    files.write(names, lambda: payloads)
    files.close()


@pytest.fixture
def kept(tmp_path):
    """A folder with three pages, and their names."""
    files = opened(tmp_path / "cache")
    names = files.names(TEXT[:12], "", 4)
    assert files.missing(names) == [0, 1, 2]
    write(files, names, [b"a" * 100, b"b" * 100, b"c" * 100])
    return tmp_path / "cache", names


def test_pages_are_found_after_a_restart(kept):
    folder, names = kept
    files = opened(folder)
    assert files.known(names) == 3 and files.missing(names) == []
    assert files.read(names).result(10) == [b"a" * 100, b"b" * 100, b"c" * 100]
    assert files.known(files.names(TEXT, "", 4)) == 3
    files.close()


def test_names_differ_with_text_owner_page_and_weights(kept):
    folder, names = kept
    files, other = opened(folder), opened(folder, fingerprint="v")
    assert files.names(TEXT[:14], "", 4) == names
    different = [
        files.names(TEXT[:12], "ada", 4), files.names((9, *TEXT[1:12]), "", 4),
        files.names(TEXT[:12], "", 6), other.names(TEXT[:12], "", 4),
    ]  # fmt: skip
    assert not any(set(names) & set(others) for others in different)
    assert other.known(other.names(TEXT, "", 4)) == 0
    # The tokens before a page are part of its name.
    assert files.names((9, *TEXT[1:12]), "", 4)[2] != names[2]
    files.close(), other.close()


def test_nobody_else_may_read_them(kept):
    folder, names = kept
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "pages")]
    assert modes == [0o700, 0o700]
    assert stat.S_IMODE((folder / "pages" / names[0]).stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["cut", "bit", "foreign", "renamed"])
def test_damaged_file_is_removed_and_what_follows_is_not_read(kept, damage, caplog):
    folder, names = kept
    path = folder / "pages" / names[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= damage == "bit"
    path.write_bytes({"cut": data[:-3], "foreign": b"something else"}.get(damage, data))
    if damage == "renamed":
        path.write_bytes((folder / "pages" / names[2]).read_bytes())
    files = opened(folder)
    assert files.read(names).result(10) == [b"a" * 100] and not path.exists()
    assert "is damaged or of something else" in caplog.text
    assert files.known(names) == 1 and files.missing(names) == [1]
    files.close()


def test_the_least_recently_used_make_room_over_restarts_too(kept):
    folder, names = kept
    size = (folder / "pages" / names[0]).stat().st_size
    for number, name in enumerate(names):
        os.utime(folder / "pages" / name, (number, number))
    files = opened(folder, n_bytes=3 * size)
    files.known(names[:1])  # is used now
    more = files.names(TEXT[20:24], "", 4)
    write(files, more, [b"d" * 100])
    left = {path.name for path in (folder / "pages").iterdir()}
    assert left == {names[0], names[2], more[0]}
    opened(folder, n_bytes=size).close()
    assert [path.name for path in (folder / "pages").iterdir()] == more


def test_a_texts_end_goes_before_its_beginning(kept):
    folder, names = kept
    files = opened(folder)
    files.known(names)
    size = (folder / "pages" / names[0]).stat().st_size
    files.close()
    files = opened(folder, n_bytes=3 * size)
    files.known(names)
    write(files, files.names(TEXT[20:24], "", 4), [b"d" * 100])
    assert opened(folder).known(names) == 2


def test_what_does_not_fit_is_not_written(tmp_path):
    files = opened(tmp_path, n_bytes=50)
    write(files, files.names(TEXT[:4], "", 4), [b"a" * 100])
    assert not any((tmp_path / "pages").iterdir())


def test_other_files_are_left_alone_and_half_written_ones_are_not(kept):
    folder, names = kept
    (folder / "pages" / "notes.txt").write_text("mine")
    (folder / "pages" / f"{names[0]}.new").write_text("half")
    opened(folder, n_bytes=1).close()
    assert [path.name for path in (folder / "pages").iterdir()] == ["notes.txt"]


def test_folder_that_cannot_be_made_is_told_once(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    files = opened(tmp_path / "file" / "cache")
    names = files.names(TEXT[:8], "", 4)
    assert files.missing(names) == [] and files.known(names) == 0
    assert caplog.text.count("takes no more") == 1
    files.close()


def test_full_disk_is_told_once_and_what_is_there_stays(kept, monkeypatch, caplog):
    folder, names = kept
    files = opened(folder)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    more = files.names(TEXT[20:32], "", 4)
    for name in more:
        files.write([name], lambda: [b"x"])
    assert files.read(names[:1]).result(10) == [b"a" * 100]
    files.close()
    told = f"context cache in {folder} takes no more: [Errno 28] No space left on device"
    assert caplog.text.count(told) == 1
    assert files.missing(more) == [] and files.known(names) == 3


def test_nobody_waits_for_the_disk(tmp_path, caplog):
    """What is being written is neither missing nor known, and beyond a bound it is not kept."""
    caplog.set_level(logging.WARNING)
    files, gate = opened(tmp_path), threading.Event()
    names = files.names(tuple(range(1200)), "", 4)

    def slow():
        gate.wait(30)
        return [b"x"] * len(names)

    files.write(names, slow)
    assert files.missing(names[:4]) == [] and files.known(names) == 0
    assert files.missing(files.names(TEXT, "ada", 4)) == []
    gate.set()
    files.close()
    assert files.known(names) == len(names)
