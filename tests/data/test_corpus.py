"""The split, the cache and its failures, on corpora of a few lines."""

import json
import os
import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from dsjax.data import corpus as corpus_module
from dsjax.data.corpus import TokenizedDocuments, prepare_corpus
from dsjax.text.tokenizer import train_tokenizer

VOCAB = 300


def texts(count: int) -> list[str]:
    return [f"document {i} says \u00e9 {i * i}\n" * (1 + i % 5) for i in range(count)]


@pytest.fixture
def files(tmp_path):
    """Writes documents as JSON lines into the corpus folder and returns its glob."""

    def make(documents, name="a.jsonl"):
        path = tmp_path / "text" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return f"{tmp_path}/text/*.jsonl"

    return make


@pytest.fixture
def prepare(tmp_path):
    def call(files, **options):
        return prepare_corpus(
            files=files, **{"vocab_size": VOCAB, "cache_dir": str(tmp_path / "cache")} | options
        )

    return call


def decoded(corpus, side):
    documents: TokenizedDocuments = getattr(corpus, side)
    return [corpus.tokenizer.decode(documents[i]) for i in range(len(documents))]


def entries(tmp_path):
    names = os.listdir(tmp_path / "cache" / "corpus")
    return sorted(name for name in names if not name.startswith(".lock-"))


def test_corpus_holds_every_document_once_with_its_bytes(files, prepare):
    corpus = prepare(files(texts(60)), heldout_fraction=0.2)
    assert sorted(decoded(corpus, "train") + decoded(corpus, "heldout")) == sorted(texts(60))
    assert 4 <= len(corpus.heldout) <= 24
    for side in ("train", "heldout"):
        documents = getattr(corpus, side)
        sizes = [len(text.encode()) for text in decoded(corpus, side)]
        assert documents.byte_counts.tolist() == sizes
        assert documents.total_bytes == sum(sizes)
        assert documents.lengths.sum() == documents.total_tokens == len(documents.tokens)
    assert corpus.train.tokens.dtype == np.uint16


def test_heldout_texts_are_the_heldout_documents(files, prepare):
    corpus = prepare(files(texts(60)), heldout_fraction=0.2)
    names, found = zip(*corpus.heldout_texts(), strict=True)
    assert list(found) == decoded(corpus, "heldout")
    assert [texts(60)[int(name.removeprefix("a.jsonl:")) - 1] for name in names] == list(found)


def test_split_does_not_move_when_documents_are_added(files, prepare):
    before = prepare(files(texts(60)), heldout_fraction=0.2)
    files(texts(90))
    after = prepare(files(["new"] * 5, name="0.jsonl"), heldout_fraction=0.2)
    assert set(before.heldout_names) < set(after.heldout_names)
    added = set(after.heldout_names) - set(before.heldout_names)
    assert all(name.startswith("0") or int(name.split(":")[1]) > 60 for name in added)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_of_the_split_is_ever_empty(files, prepare, fraction):
    corpus = prepare(files(["one " * 9, "two " * 9]), heldout_fraction=fraction)
    assert (len(corpus.train), len(corpus.heldout)) == (1, 1)


def test_heldout_files_are_taken_out_of_files(files, prepare, tmp_path):
    files(texts(3), name="held.jsonl")
    pattern = files(["train " * 9])
    corpus = prepare(pattern, heldout_files=f"{tmp_path}/text/held.jsonl")
    assert decoded(corpus, "heldout") == texts(3)
    assert decoded(corpus, "train") == ["train " * 9]


def test_second_call_maps_the_cache(files, prepare, tmp_path):
    pattern, calls = files(texts(9)), []
    first = prepare(pattern, progress=lambda done, total: calls.append(done))
    assert calls
    calls.clear()
    second = prepare(pattern, progress=lambda done, total: calls.append(done))
    assert not calls  # nothing was tokenized
    assert second.train.fingerprint == first.train.fingerprint
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    np.testing.assert_array_equal(second.train.tokens, first.train.tokens)
    assert len(entries(tmp_path)) == 1


def test_cache_goes_by_content_not_by_time_or_place(files, prepare, tmp_path):
    pattern = files(texts(9))
    first = prepare(pattern)
    os.utime(tmp_path / "text" / "a.jsonl", ns=(0, 0))
    (tmp_path / "text").rename(tmp_path / "moved")
    assert prepare(f"{tmp_path}/moved/*.jsonl").folder == first.folder


def test_cache_of_large_files_goes_by_time(files, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "HASH_CONTENT_BELOW", 10)
    pattern = files(texts(9))
    first = prepare(pattern)
    assert prepare(pattern).folder == first.folder
    os.utime(tmp_path / "text" / "a.jsonl", ns=(0, 0))
    second = prepare(pattern)
    assert second.folder != first.folder
    assert second.train.fingerprint == first.train.fingerprint


def test_cache_entry_differs_with_all_that_decides_it(files, prepare, tmp_path):
    train_tokenizer(texts(9), vocab_size=280).save(str(tmp_path))
    pattern = files(texts(9))
    options = [
        {},
        {"vocab_size": 290},
        {"heldout_fraction": 0.3},
        {"tokenizer_path": str(tmp_path)},
        {"skip": True},
        {"heldout_files": files(["held"], name="held.jsonl")[:-7] + "held.jsonl"},
    ]
    folders = [prepare(pattern, **option).folder for option in options]
    files(texts(10))
    folders.append(prepare(pattern).folder)
    assert len(set(folders)) == len(folders)


def test_given_tokenizer_is_used(files, prepare, tmp_path):
    given = train_tokenizer(texts(9), vocab_size=280)
    given.save(str(tmp_path))
    for _ in range(2):
        corpus = prepare(files(texts(9)), tokenizer_path=str(tmp_path))
        assert corpus.tokenizer.fingerprint == given.fingerprint
    assert sorted(decoded(corpus, "train") + decoded(corpus, "heldout")) == sorted(texts(9))


def test_vocabularies_above_16_bits_are_stored_in_32(files, prepare, tmp_path):
    tokenizer = json.loads(train_tokenizer(texts(9), vocab_size=270).inner.to_str())
    vocab = tokenizer["model"]["vocab"]
    vocab["far"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    corpus = prepare(files(texts(9)), tokenizer_path=str(tmp_path), vocab_size=70_001)
    assert corpus.train.tokens.dtype == np.uint32
    assert sorted(decoded(corpus, "train") + decoded(corpus, "heldout")) == sorted(texts(9))


def test_batches_do_not_change_the_tokens(files, prepare, tmp_path, monkeypatch):
    pattern = files(texts(40))
    whole = prepare(pattern)
    for name, value in (("BATCH_BYTES", 100), ("BATCH_DOCUMENTS", 3)):
        monkeypatch.setattr(corpus_module, name, value)
        cut = prepare(pattern, cache_dir=str(tmp_path / name))
        assert cut.train.fingerprint == whole.train.fingerprint


def test_tokenizer_training_takes_an_even_share_of_much_text(files, prepare, monkeypatch):
    seen = []

    def record(texts, **options):
        seen.extend(texts)
        return train_tokenizer(seen, **options)

    pattern = files([f"same size {number:03} " * 4 for number in range(100)])
    monkeypatch.setattr(corpus_module.tokenizer, "train_tokenizer", record)
    monkeypatch.setattr(corpus_module, "TOKENIZER_BYTES", 1000)
    prepare(pattern)
    assert 18 <= len(seen) <= 22


def test_progress_ascends_to_its_total(files, prepare):
    calls = []
    prepare(files(texts(40)), progress=lambda done, total: calls.append((done, total)))
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}


@pytest.mark.parametrize("part", ["meta.json", "train.tokens", "heldout.bytes", "heldout.text"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_damaged_cache_entries_are_made_again(files, prepare, part, damage):
    pattern = files(texts(9))
    corpus = prepare(pattern)
    want = decoded(corpus, "train"), list(corpus.heldout_texts())
    path = Path(corpus.folder, part)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    again = prepare(pattern)
    assert (decoded(again, "train"), list(again.heldout_texts())) == want


def test_interrupted_preparation_leaves_nothing(files, prepare, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(files(texts(9)), progress=stop)
    assert entries(tmp_path) == []


def test_racing_preparations_agree(files, prepare, tmp_path):
    pattern = files(texts(40))
    found = []
    threads = [threading.Thread(target=lambda: found.append(prepare(pattern))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({corpus.train.fingerprint for corpus in found}) == 1 and len(found) == 4
    assert len(entries(tmp_path)) == 1


def test_leftovers_of_killed_preparations_are_swept_after_a_day(files, prepare, tmp_path):
    for name, age in (("old", 2 * 86400), ("young", 3600)):
        folder = tmp_path / "cache" / "corpus" / f".writing-{name}"
        folder.mkdir(parents=True)
        (folder / "train.tokens").write_bytes(b"x")
        then = (folder / "train.tokens").stat().st_mtime - age
        os.utime(folder / "train.tokens", (then, then))
    prepare(files(texts(9)))
    assert ".writing-young" in entries(tmp_path) and ".writing-old" not in entries(tmp_path)


def test_cache_lies_in_the_users_cache_folder(files, prepare, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert prepare(files(texts(9)), cache_dir="").folder.startswith(f"{tmp_path}/x/dsjax/corpus/")


def test_full_disk_is_told_with_the_cache_folder(files, prepare, tmp_path):
    pattern = files(texts(200))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write the token cache \(File too large\); make"):
            prepare(pattern)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path) == []


def test_unusable_cache_folder_is_told(files, prepare, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"token cache .*set data\.cache_dir: '.*/file/corpus'"):
        prepare(files(texts(9)), cache_dir=str(tmp_path / "file"))


def test_corpus_rejects_what_cannot_be_split(files, prepare, tmp_path):
    with pytest.raises(
        ValueError, match=r"has 1 document\(s\) in 1 file\(s\), and needs 2 to hold"
    ):
        prepare(files(["only one"]))
    empty = files([""], name="empty.jsonl")[:-7] + "empty.jsonl"
    with pytest.raises(ValueError, match=r"files of data\.heldout_files hold no text"):
        prepare(f"{tmp_path}/text/a.jsonl", heldout_files=empty)
    with pytest.raises(ValueError, match=r"files of data\.files hold no text"):
        prepare(empty, heldout_files=f"{tmp_path}/text/a.jsonl")
    with pytest.raises(
        ValueError, match=r"data\.heldout_files=.* takes every file of data\.files="
    ):
        prepare(empty, heldout_files=empty)


def test_corpus_rejects_a_tokenizer_too_large_for_the_model(files, prepare, tmp_path):
    train_tokenizer(texts(60), vocab_size=290).save(str(tmp_path))
    with pytest.raises(ValueError, match=r"ids up to 289, too many for model\.vocab_size=280"):
        prepare(files(texts(9)), tokenizer_path=str(tmp_path), vocab_size=280)


def test_corpus_rejects_a_tokenizer_that_deletes_the_text(files, prepare, tmp_path):
    content = json.loads(train_tokenizer(texts(9), vocab_size=270).inner.to_str())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not give the text of a\.jsonl:1 back: 'doc"):
        prepare(files(texts(9)), tokenizer_path=str(tmp_path))


def test_corpus_rejects_files_that_change_meanwhile(files, prepare, tmp_path):
    pattern = files(texts(9))

    def touch(done, total):
        os.utime(tmp_path / "text" / "a.jsonl", ns=(0, 0))

    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read"):
        prepare(pattern, progress=touch)
    assert entries(tmp_path) == []


def test_copies_never_straddle_the_split(files, prepare):
    corpus = prepare(files([*texts(3) * 100, *(f" {text}\n" for text in texts(3))]))
    train, heldout = (
        {" ".join(text.split()) for text in decoded(corpus, side)} for side in ("train", "heldout")
    )
    assert train and heldout and not train & heldout
    assert corpus.copies == 300 and corpus.left_out == 0


def test_copies_of_heldout_files_are_not_trained_on(files, prepare, tmp_path):
    files(texts(3), name="held.jsonl")
    pattern = files(["train " * 9, texts(3)[1], "more " * 9])
    corpus = prepare(pattern, heldout_files=f"{tmp_path}/text/held.jsonl")
    assert decoded(corpus, "train") == ["train " * 9, "more " * 9] and corpus.left_out == 1
    again = prepare(pattern, heldout_files=f"{tmp_path}/text/held.jsonl")
    assert (again.left_out, again.copies, again.parts) == (1, 1, (2,))
    with pytest.raises(ValueError, match=r"data\.files hold no text that is not held out"):
        files(texts(3))
        prepare(pattern, heldout_files=f"{tmp_path}/text/held.jsonl")


def test_corpus_of_one_text_is_refused(files, prepare):
    with pytest.raises(ValueError, match=r"has 9 document\(s\), all of one text, in 1 file"):
        prepare(files(["one"] * 9))


def test_parts_of_a_mixture_are_kept_apart(files, prepare, tmp_path):
    files([f"left {text}" for text in texts(20)], name="b.jsonl")
    files([f"right {text}" for text in texts(40)], name="a.jsonl")
    pattern = f"{tmp_path}/text/b.jsonl,{tmp_path}/text/a.jsonl"
    corpus = prepare(pattern, apart=True, heldout_fraction=0.2)
    left, right = corpus.train_parts()
    assert len(left) + len(right) == len(corpus.train) and len(corpus.heldout) > 0
    for side, part in (("left", left), ("right", right)):
        found = [corpus.tokenizer.decode(part[index]) for index in range(len(part))]
        assert found and all(text.startswith(side) for text in found)
        assert (
            part.total_tokens
            == part.lengths.sum()
            == sum(map(len, map(part.__getitem__, range(len(part)))))
        )
    assert len({left.fingerprint, right.fingerprint, corpus.train.fingerprint}) == 3
    assert prepare(pattern).folder != corpus.folder
    with pytest.raises(ValueError, match=r"b\.jsonl is in two parts of the mixture"):
        prepare(f"{pattern},{tmp_path}/text", apart=True)


def test_records_that_cannot_be_read_are_skipped_and_written_down(files, prepare, tmp_path):
    pattern = files(texts(9))
    path = tmp_path / "text" / "a.jsonl"
    path.write_text("broken\n" + path.read_text())
    with pytest.raises(ValueError, match=r"line 1 is not JSON.* per line; or go[^;]*=skip$"):
        prepare(pattern)
    for _ in range(2):
        corpus = prepare(pattern, skip=True)
        assert sorted(decoded(corpus, "train") + decoded(corpus, "heldout")) == sorted(texts(9))
        assert corpus.rejected == 1
        (line,) = Path(corpus.folder, corpus_module.REJECTED).read_text().splitlines()
        assert json.loads(line)["file"] == str(path) and "line 1" in json.loads(line)["problem"]


def test_a_lossy_tokenizer_is_refused(files, prepare, tmp_path):
    content = json.loads(train_tokenizer(texts(9), vocab_size=270).inner.to_str())
    content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    files(["Upper case\n", *texts(9)])
    with pytest.raises(ValueError, match=r"'Upper case' becomes 'upper case' at character 0"):
        prepare(f"{tmp_path}/text/a.jsonl", tokenizer_path=str(tmp_path))
