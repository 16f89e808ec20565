"""The trained tokenizer, loading of others, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.text import tokenizer
from dsjax.text.tokenizer import check_vocab, load_tokenizer, train_tokenizer

CODE = (
    "def add(left, right):\n    if left is None:\n        return 12345\n    return left + right\n"
)


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer([CODE * 20, "na\u00efve caf\u00e9 \u4f60\u597d"], vocab_size=300)


@pytest.fixture
def word_level(tmp_path):
    """Writes a tokenizer.json with the given entries and no special tokens."""

    def make(vocab, **extra):
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
        content = json.loads(inner.to_str()) | extra
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return tmp_path / "tokenizer.json"

    return make


def test_trained_tokenizer_has_deepseeks_special_tokens_first(trained):
    assert [trained.inner.id_to_token(i) for i in range(6)] == [
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<\uff5c\u2581pad\u2581\uff5c>",
        "<\uff5cfim\u2581begin\uff5c>",
        "<\uff5cfim\u2581hole\uff5c>",
        "<\uff5cfim\u2581end\uff5c>",
    ]
    assert trained.special == tokenizer.SpecialTokens(bos=0, eos=1, pad=2, fim=(3, 4, 5))


def test_trained_tokenizer_has_the_size_asked_for_or_less(trained):
    assert trained.vocab_size == 300
    assert train_tokenizer(["ab"], vocab_size=5000).vocab_size < 300


def test_training_twice_gives_the_same_tokenizer(trained):
    texts = [CODE * 20, "na\u00efve caf\u00e9 \u4f60\u597d"]
    assert train_tokenizer(texts, vocab_size=300).fingerprint == trained.fingerprint
    assert train_tokenizer(texts, vocab_size=299).fingerprint != trained.fingerprint


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_encoding_loses_nothing(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_pretokenizer_groups_digits_and_joins_indentation_to_the_line_break(trained):
    split = trained.inner.pre_tokenizer.pre_tokenize_str("x = 12345:\n        return")
    pieces = [piece.replace("\u0120", " ").replace("\u010a", "\n") for piece, _ in split]
    assert pieces == ["x", " =", " ", "123", "45", ":\n       ", " return"]


def test_special_tokens_in_a_text_are_plain_characters(trained):
    text = f"a{tokenizer.EOS}b"
    ids = trained.encode(text)
    assert min(ids) >= len(tokenizer.SPECIAL_TOKENS)
    assert trained.decode(ids) == text


@pytest.fixture(scope="module")
def released(trained):
    """A tokenizer with control tokens as DeepSeek's releases have them, not called special, and an
    added word that is none.
    """
    inner = tokenizers.Tokenizer.from_str(trained.inner.to_str())
    names = ["<\uff5cUser\uff5c>", "<think>", "</think>", "<a<think>", "return left", "<think>s"]
    inner.add_tokens([tokenizers.AddedToken(name, special=False) for name in names])
    return tokenizer.Coder(inner)


@pytest.mark.parametrize(
    "text",
    [
        "hi<\uff5cUser\uff5c>",
        "<think>",
        "<<think></think>",
        "a<a<think>b",
        tokenizer.EOS + "<think>",
    ],
)
def test_control_tokens_in_a_text_are_plain_characters_whatever_the_file_calls_them(released, text):
    assert not set(released.encode(text)) & set(released.control.values())
    assert released.decode(released.encode(text), skip_special=False) == text


def test_control_tokens_are_parsed_where_they_are_meant(released):
    user, think, close, nested, _, longer = range(300, 306)
    text = "hi<\uff5cUser\uff5c>a<think></think><think>s<a<think>" + tokenizer.EOS
    hi, a = released.encode("hi"), released.encode("a")
    assert released.encode_control(text) == [*hi, user, *a, think, close, longer, nested, 1]
    assert released.encode_control("plain") == released.encode("plain")


def test_added_words_are_no_control_tokens(released):
    assert released.encode("return left") == [304]
    assert "return left" not in released.control and len(released.control) == 6 + 5


def test_marks_break_every_control_token(released):
    broken = released.break_control("x<a<think>y" + tokenizer.BOS, "#")
    assert broken == "x<#a<#think>y<#" + tokenizer.BOS[1:]


def test_decode_shows_special_tokens_only_when_asked(trained):
    ids = [trained.special.bos, *trained.encode("left"), trained.special.eos]
    assert trained.decode(np.array(ids)) == "left"
    assert trained.decode(ids, skip_special=False) == f"{tokenizer.BOS}left{tokenizer.EOS}"


def test_long_texts_are_encoded_in_pieces_to_the_same_tokens(trained, monkeypatch):
    texts = [CODE * 9, "x", "", "no_line_break" * 30]
    whole = trained.encode_batch(texts)
    monkeypatch.setattr(tokenizer, "_PIECE_CHARACTERS", 50)
    pieces = list(tokenizer._pieces(texts[0], 50))
    assert len(pieces) > 5 and all(piece.startswith("def") for piece in pieces)
    for got, want, text in zip(trained.encode_batch(texts), whole, texts, strict=True):
        if "\n" in text:
            np.testing.assert_array_equal(got, want)
        assert trained.decode(got) == text


def test_saved_tokenizer_loads_as_the_same(trained, tmp_path):
    trained.save(str(tmp_path))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(path))
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.special == trained.special


def test_loading_finds_special_tokens_in_the_config_beside_it(word_level, tmp_path):
    path = word_level({"a": 0, "[B]": 4, "[E]": 7})
    config = {"bos_token": {"content": "[B]", "lstrip": False}, "eos_token": "[E]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(str(path))
    assert loaded.special == tokenizer.SpecialTokens(bos=4, eos=7, pad=7, fim=None)
    assert loaded.vocab_size == 8  # ids have holes


def test_loading_prefers_deepseeks_names(trained, tmp_path):
    trained.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "x", "eos_token": "y"}')
    assert load_tokenizer(str(tmp_path)).special == trained.special


def test_loaded_tokenizer_encodes_the_text_alone_and_whole(trained, tmp_path):
    inner = tokenizers.Tokenizer.from_str(trained.inner.to_str())
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{tokenizer.BOS} $A", special_tokens=[(tokenizer.BOS, 0)]
    )
    inner.enable_truncation(3)
    inner.enable_padding(length=1000)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode(CODE) == trained.encode(CODE)


def test_loading_rejects_what_is_no_tokenizer(word_level, tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*none' is not a file; give"):
        load_tokenizer(str(tmp_path / "none"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"broken\.json' is not a tokenizer\.json that can be"):
        load_tokenizer(str(broken))
    with pytest.raises(ValueError, match=r"has an empty vocabulary"):
        load_tokenizer(str(word_level({})))


def test_loading_rejects_missing_special_tokens(word_level, tmp_path):
    path = str(word_level({"a": 0, "[B]": 1}))
    with pytest.raises(ValueError, match=r"has no token '<.begin.*names none as bos_token; write"):
        load_tokenizer(path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "[B]", "eos_token": "[E]"}')
    with pytest.raises(ValueError, match=r'names none as eos_token; write \{"eos_token": "\.\.\."'):
        load_tokenizer(path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*tokenizer_config\.json: .*; repair it"):
        load_tokenizer(path)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds no JSON object"):
        load_tokenizer(path)


def test_a_panic_of_the_library_becomes_an_error(trained, tmp_path):
    content = json.loads(trained.inner.to_str())
    evil = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated"}
    content["pre_tokenizer"] = evil | {"invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot encode a text: "):
        loaded.encode("x" * 5000)


def test_failures_let_an_interrupt_through():
    with pytest.raises(KeyboardInterrupt), tokenizer._library_failures("hidden"):
        raise KeyboardInterrupt


def test_training_rejects_a_vocabulary_without_room():
    with pytest.raises(ValueError, match=r"model\.vocab_size=261 cannot hold .* at least 262"):
        train_tokenizer(["x"], vocab_size=261)
    assert train_tokenizer(["x"], vocab_size=262).vocab_size == 262


def test_vocab_check_names_both_sizes(trained):
    check_vocab(trained, 300)
    message = r"ids up to 299, too many for model\.vocab_size=299; set model\.vocab_size=300"
    with pytest.raises(ValueError, match=message):
        check_vocab(trained, 299)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "run `git lfs pull`"),
        (b"<html><body>Sign in</body></html>", "a web page"),
    ],
)
def test_tokenizer_that_is_something_else_is_named(tmp_path, data, what):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"tokenizer\.json' is .*{what}"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
