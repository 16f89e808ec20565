"""Bytes of tokens, of both kinds of tokenizers."""

import tokenizers
from tokenizers import models

from dsjax.text.token_bytes import TokenBytes
from dsjax.text.tokenizer import BOS, Coder, train_tokenizer
from tests.text import released


def test_bytes_of_tokens_join_to_the_text():
    coder = train_tokenizer(["Some \u00fcmlauts and \u4e2d\u6587. " * 9], vocab_size=300)
    text = "\u00fcber \u4e2d\u6587\n\t\u0000\U0001f600 and so on"
    found = TokenBytes(coder)
    ids = coder.encode(text)
    assert b"".join(found.of(token) for token in ids) == text.encode()
    assert any(len(found.of(token)) > 1 for token in ids)
    assert found.of(coder.control[BOS]) == BOS.encode()


def test_added_tokens_and_unused_ids():
    found = TokenBytes(Coder(released.make_tokenizer(released.V3_1)))
    assert found.of(released.IDS["<think>"]) == b"<think>"
    assert found.of(128_000) == b""


def test_sentencepiece_spells_spaces_and_bytes_its_own_way():
    vocabulary = {"<s>": 0, "\u2581the": 1, "<0x0A>": 2, "\u4e2d": 3}
    found = TokenBytes(Coder(tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))))
    assert [found.of(token) for token in (1, 2, 3)] == [b" the", b"\n", "\u4e2d".encode()]
