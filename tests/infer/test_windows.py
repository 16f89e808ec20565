"""Every token is predicted once, and text becomes the tokens that the checkpoint's tokenizer makes
of it."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dsjax.infer import windows
from dsjax.infer.windows import TextFiles, Window
from dsjax.text.tokenizer import Coder, train_tokenizer
from dsjax.text.vocabulary import open_vocabulary


def spans(count, length, stride):
    """(first read, first scored, end) of each window over the numbers 0 to count - 1."""
    tokens = np.arange(count, dtype=np.int32)
    found = []
    for window in windows.cut(tokens, length=length, stride=stride, owner=5):
        assert window.owner == 5 and window.size <= length
        start = int(window.tokens[0])
        np.testing.assert_array_equal(window.tokens, tokens[start : start + window.size + 1])
        found.append((start, start + window.first + 1, start + window.size + 1))
    return found


@given(st.integers(1, 60), st.integers(2, 12), st.data())
def test_cut_scores_each_token_once_with_enough_context(count, length, data):
    stride = data.draw(st.integers(1, length))
    found = spans(count, length, stride)
    scored = [token for _, first, end in found for token in range(first, end)]
    assert scored == list(range(1, count))
    for start, first, _ in found:
        assert start == 0 or first - start > length - stride


def test_cut_overlaps_as_the_harness_does():
    """The example of lm_eval.api.model.LM.loglikelihood_rolling: the begin token and ten more,
    windows of four, no overlap but for the last, which is filled up with context."""
    assert spans(11, 4, 4) == [(0, 1, 5), (4, 5, 9), (6, 9, 11)]
    assert spans(11, 4, 2) == [(0, 1, 5), (2, 5, 7), (4, 7, 9), (6, 9, 11)]


@given(st.lists(st.integers(1, 10), max_size=30))
def test_pack_keeps_every_window_in_order(sizes):
    given = [Window(i, np.zeros(size + 1, np.int32), 0) for i, size in enumerate(sizes)]
    rows = list(windows.pack(given, 10))
    assert [window.owner for row in rows for window in row] == list(range(len(sizes)))
    filled = [sum(window.size for window in row) for row in rows]
    assert all(0 < size <= 10 for size in filled)
    for full, row in zip(filled, rows[1:], strict=False):
        assert full + row[0].size > 10


def test_stack_keeps_windows_apart():
    first, second = (Window(0, np.arange(i, i + 4, dtype=np.int32), 0) for i in (10, 20))
    batch = windows.stack([[first, second], [second]], n_rows=3, length=8)
    assert batch.inputs.shape == (3, 8)
    np.testing.assert_array_equal(batch.inputs[0], [10, 11, 12, 20, 21, 22, 0, 0])
    np.testing.assert_array_equal(batch.targets[0], [11, 12, 13, 21, 22, 23, 0, 0])
    np.testing.assert_array_equal(batch.segment_ids[:2, :4], [[1, 1, 1, 2], [1, 1, 1, 0]])
    assert not batch.segment_ids[2].any()
    assert [(row, start) for _, row, start in batch.places] == [(0, 0), (0, 3), (1, 0)]


@pytest.mark.parametrize(("size", "width"), [(3, 64), (65, 128), (128, 128), (150, 200)])
def test_stack_has_few_widths(size, width):
    window = Window(0, np.zeros(size + 1, np.int32), 0)
    assert windows.stack([[window]], n_rows=1, length=200).inputs.shape == (1, width)


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(["some text to learn from, some more text"] * 3, vocab_size=280)


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(str(tmp_path))
    return tmp_path


def test_text_is_encoded_document_by_document(folder, trained, tmp_path):
    lines = ["some text", "", "\u00e4 more"]
    path = tmp_path / "a, b.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "c.txt").write_text("learn")
    text = windows.read_text(TextFiles([str(path), str(tmp_path / "*.txt")]), tmp_path, 280)
    bos = trained.special.bos
    want = [[bos, *trained.encode(line)] for line in ("some text", "\u00e4 more", "learn")]
    assert [document.tolist() for document in text.documents] == want
    assert text.bytes == 9 + 7 + 5 and text.tokens == sum(len(ids) - 1 for ids in want)
    assert {document.dtype for document in text.documents} == {np.dtype(np.int32)}


def test_text_is_encoded_in_batches(trained, monkeypatch):
    texts = ["some text", "to learn", "from", "some more text"] * 5
    whole = windows.encode(trained, 7, texts)
    monkeypatch.setattr(windows, "_BATCH_BYTES", 20)
    parts = windows.encode(trained, 7, iter(texts))
    assert [d.tolist() for d in parts.documents] == [d.tolist() for d in whole.documents]
    assert len(parts.documents) == 20 and parts.bytes == whole.bytes


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({}, "bos"),
        ({"add_bos_token": True}, "bos"),
        ({"add_bos_token": False}, "eos"),
    ],
)
def test_first_token_is_what_the_tokenizer_config_asks_for(folder, trained, changes, begins):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    vocabulary = open_vocabulary(folder, 280)
    assert windows.first_token(vocabulary) == getattr(trained.special, begins)


def test_first_token_needs_a_begin_or_an_end_token(folder):
    vocabulary = dataclasses.replace(open_vocabulary(folder, 280), begins=False, eos=None)
    with pytest.raises(ValueError, match=r"neither a begin nor an end token.*; name one in token"):
        windows.first_token(vocabulary)


def test_text_rejects_a_tokenizer_of_another_model(folder):
    with pytest.raises(ValueError, match=r"has ids up to \d+, and the model has 100 tokens"):
        windows.read_text(TextFiles(["x"]), folder, 100)


def test_text_rejects_files_without_text(folder):
    (folder / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"--text .*empty\.txt: there is no text in it"):
        windows.read_text(TextFiles([str(folder / "empty.txt")]), folder, 280)
    with pytest.raises(ValueError, match=r"--text='none\.txt' matches no file"):
        windows.read_text(TextFiles(["none.txt"]), folder, 280)


def test_window_length_has_a_default_and_limits():
    assert windows.window_length(0, 163840) == 4096
    assert windows.window_length(0, 2048) == 2048
    assert windows.window_length(100, 2048) == 100
    for asked in (1, 2049, -3):
        with pytest.raises(ValueError, match=rf"--sequence-length {asked} is not between 2 and"):
            windows.window_length(asked, 2048)


def test_text_comes_from_the_field_that_is_named(folder, trained):
    (folder / "a.jsonl").write_text('{"text": "some", "content": "some more text"}\n')
    files = TextFiles([str(folder / "a.jsonl")], field="content")
    (document,) = windows.read_text(files, folder, 280).documents
    assert trained.decode(document[1:]) == "some more text"
    with pytest.raises(ValueError, match=r"no field 'body' but content, text; set --text-field$"):
        windows.read_text(files._replace(field="body"), folder, 280)


def test_text_can_go_without_the_begin_token(folder, trained):
    (folder / "a.txt").write_text("some text")
    files = TextFiles([str(folder / "a.txt")])
    with_bos, without = (
        windows.read_text(files._replace(bos=bos), folder, 280).documents[0]
        for bos in (True, False)
    )
    assert with_bos[0] == trained.special.bos and without[0] == trained.special.eos
    np.testing.assert_array_equal(with_bos[1:], without[1:])


def test_bytes_of_a_text_that_the_tokenizer_loses_are_unknown(trained, caplog):
    content = json.loads(trained.inner.to_str()) | {"normalizer": {"type": "Lowercase"}}
    lossy = Coder(tokenizers.Tokenizer.from_str(json.dumps(content)))
    assert windows.encode(lossy, 7, ["some text"]).bytes == 9 and not caplog.messages
    assert windows.encode(lossy, 7, ["some text", "Some more"]).bytes == 0
    assert "the tokenizer does not give the text back: 'Some more' becomes 's" in caplog.text
