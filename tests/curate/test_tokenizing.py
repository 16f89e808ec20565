"""The result in the cache that training reads."""

import pytest

from dsjax.curate import shards, tokenizing, writing
from dsjax.data.corpus import prepare_corpus
from dsjax.text.tokenizer import train_tokenizer


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(["one two three\n"] * 3, vocab_size=280).save(str(tmp_path))
    (tmp_path / "out" / "text").mkdir(parents=True)
    for name, texts in (("train-a-00000", ["one two", "three"]), ("heldout-a-00000", ["one"])):
        path = tmp_path / "out" / "text" / f"{name}.parquet"
        with shards.Writer(path, writing.SCHEMA) as writer:
            for number, text in enumerate(texts):
                writer.add({"id": f"a/{number}", "source": "a", "text": text})
    return tmp_path


def test_training_finds_the_tokens(folder):
    path, cache = str(folder / "tokenizer.json"), str(folder / "cache")
    calls = []
    found = tokenizing.tokenize(folder / "out", path, cache, lambda *done: calls.append(done))
    assert calls[-1] == (15, 15)
    files, heldout_files = tokenizing.patterns(folder / "out")
    given = {"tokenizer_path": path, "vocab_size": 280, "cache_dir": cache}
    corpus = prepare_corpus(
        files=files, heldout_files=heldout_files, progress=lambda *done: pytest.fail(), **given
    )
    assert found["train"] == {
        "tokens": corpus.train.total_tokens,
        "bytes_per_token": round(12 / corpus.train.total_tokens, 3),
    }
    assert found["heldout"]["tokens"] == corpus.heldout.total_tokens and len(corpus.train) == 2


def test_folder_may_have_the_signs_of_globs_in_its_name(folder):
    odd = folder / "out[1]*"
    (folder / "out").rename(odd)
    path, cache = str(folder / "tokenizer.json"), str(folder / "cache")
    assert tokenizing.tokenize(odd, path, cache, lambda *done: None)["train"]["tokens"]


def test_side_without_text_is_named(folder):
    next((folder / "out" / "text").glob("heldout-*")).unlink()
    with pytest.raises(ValueError, match=r"data.heldout_files=.*matches no file"):
        tokenizing.tokenize(
            folder / "out", str(folder / "tokenizer.json"), str(folder / "cache"), print
        )
