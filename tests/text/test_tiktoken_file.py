"""tiktoken.model becomes a tokenizer with the ids that the tiktoken library gives."""

import base64
import functools
import json
import random
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from dsjax.text import tiktoken_file
from dsjax.text.tokenizer import Coder, load_tokenizer
from dsjax.text.vocabulary import open_vocabulary

SOURCE = Path(__file__).parents[2] / "dsjax" / "text" / "tokenizer.py"
CHINESE = (
    "\u6df1\u5ea6\u6c42\u7d22\u53d1\u5e03\u4e86\u65b0\u7684\u8bed\u8a00\u6a21\u578b\uff0c\u6a21\u578b"
    "\u4f1a\u601d\u8003\u3002\u65b0\u7684\u6a21\u578b\u66f4\u5927\u3002"
)
ENGLISH = "It's 1234567 people\u2019s texts: DON'T re-read 3.14159 or caf\u00e9s'  \r\n\r\n\tnaive"
CONFIG = {
    "tokenizer_class": "TikTokenTokenizer",
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "added_tokens_decoder": {
        "600": {"content": "[BOS]", "special": True},
        "601": {"content": "[EOS]", "special": True},
        "603": {"content": "<|tool_call_begin|>", "special": False},
    },
}
N_RANKS = 600


@functools.cache
def ranks():
    """Byte strings by rank, trained on this repository's code and some English and Chinese."""
    inner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(tiktoken_file.PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=N_RANKS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator([SOURCE.read_text(), CHINESE * 20, ENGLISH * 20], trainer)
    # The library's characters for bytes: printable Latin-1, then the rest from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + index): byte for index, byte in enumerate(rest)}
    vocab = inner.get_vocab().items()
    return {bytes(byte_of[character] for character in word): rank for word, rank in vocab}


def model_file(words=None):
    lines = (base64.b64encode(word) + b" %d\n" % rank for word, rank in (words or ranks()).items())
    return b"".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kimi")
    (folder / "tiktoken.model").write_bytes(model_file())
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder


@functools.cache
def library():
    return tiktoken.Encoding(
        "kimi", pat_str=tiktoken_file.PATTERN, mergeable_ranks=ranks(), special_tokens={}
    )


@functools.cache
def coder():
    data = tiktoken_file.to_json(model_file(), CONFIG, name="here")
    return Coder(tokenizers.Tokenizer.from_str(data.decode()))


@pytest.mark.parametrize("text", [SOURCE.read_text(), CHINESE, ENGLISH], ids=["code", "zh", "en"])
def test_ids_are_those_of_the_library(text):
    ids = coder().encode(text)
    assert ids == library().encode_ordinary(text) and len(ids) < len(text.encode())
    assert coder().decode(ids) == text


def test_ids_of_made_up_texts_are_those_of_the_library():
    """Words, digits, contractions, marks and spaces side by side as no text has them."""
    characters = (
        "aab'sStT\u017f\u4e2d\u6587\u6a21 \n\r\t12,3xyzABC\u00e9\u0301\u3042\U0001f600\u0e01\u01c5"
    )
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices(characters, k=draw.randint(1, 40)))
        assert coder().encode(text) == library().encode_ordinary(text)


def test_a_listed_word_is_one_token_even_if_no_pair_makes_it():
    words = ranks() | {b" qzxj": N_RANKS}
    data = tiktoken_file.to_json(model_file(words), CONFIG, name="here")
    found = Coder(tokenizers.Tokenizer.from_str(data.decode())).encode("a qzxj qzxjq")
    pattern = tiktoken_file.PATTERN
    kimi = tiktoken.Encoding("k", pat_str=pattern, mergeable_ranks=words, special_tokens={})
    assert found == kimi.encode_ordinary("a qzxj qzxjq") and found.count(N_RANKS) == 1


def test_pattern_is_moonlights_and_kimis():
    """Han apart from other letters, words with their contraction, digits in groups of three."""
    split = pre_tokenizers.Split(tokenizers.Regex(tiktoken_file.PATTERN), "isolated")
    text = "It's\u6a21\u578b12345 theirWORDS, ok!\n\n  x"
    pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
    assert pieces == [
        "It's", "\u6a21\u578b", "123", "45", " their", "WORDS", ",", " ok", "!\n\n", " ", " x",
    ]  # fmt: skip


def test_control_tokens_have_the_configs_names_and_the_reserved_ids(folder):
    vocabulary = open_vocabulary(folder, N_RANKS + 256)
    assert (vocabulary.bos, vocabulary.eos) == ("[BOS]", "[EOS]")
    control = vocabulary.coder.control
    assert control["<|reserved_token_602|>"] == 602 and control["<|tool_call_begin|>"] == 603
    assert sorted(control.values()) == list(range(N_RANKS, N_RANKS + 256))
    assert vocabulary.coder.vocab_size == N_RANKS + 256
    assert vocabulary.coder.encode_control("[BOS]a") == [600, *coder().encode("a")]
    # Written by a user, it is text.
    assert vocabulary.coder.encode("[EOS]") == library().encode_ordinary("[EOS]")


def test_training_reads_it_too(folder):
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.special.bos, tokenizer.special.eos) == (600, 601)
    assert tokenizer.encode(ENGLISH) == library().encode_ordinary(ENGLISH)


def test_a_tokenizer_json_comes_first(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    load_tokenizer(str(folder)).save(str(tmp_path))
    (tmp_path / "tiktoken.model").write_bytes(b"damaged")
    assert open_vocabulary(tmp_path, 2000).coder.encode("a b") == coder().encode("a b")


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1", CONFIG, "is a Git LFS pointer"),
        (b"YQ== one\n", CONFIG, r"is not a list of byte strings and ranks \(invalid literal"),
        (b"Y=Q 1\n", CONFIG, "is not a list of byte strings and ranks"),
        (b"YQ== 0\n", CONFIG, r"lacks ranks or single bytes \(1 entries\); copy it again"),
        (None, CONFIG, r"lacks ranks or single bytes \(599 entries\)"),
        (
            b"",
            CONFIG | {"tokenizer_class": "QWenTokenizer"},
            "tokenizer_class='QWenTokenizer'; only",
        ),
        (b"", {}, "tokenizer_class=None; only Moonlight's and Kimi-K2's TikTokenTokenizer can"),
    ],
    ids=["pointer", "rank", "base64", "one", "lacking", "class", "no class"],
)
def test_another_file_is_refused(data, config, message):
    data = (
        model_file({word: rank for word, rank in ranks().items() if rank != 300})
        if data is None
        else data
    )
    with pytest.raises(ValueError, match=message):
        tiktoken_file.to_json(data, config, name="x/tiktoken.model")


def test_tiktoken_model_that_is_something_else_is_named():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"
    with pytest.raises(ValueError, match=r"k2/tiktoken\.model is a Git LFS pointer.*git lfs pull"):
        tiktoken_file.to_json(pointer, CONFIG, name="k2/tiktoken.model")
