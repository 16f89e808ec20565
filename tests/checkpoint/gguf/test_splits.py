"""Pre-tokenizers are recognized by what they do, however they are written."""

import pytest
from tokenizers import Regex, pre_tokenizers

from dsjax.checkpoint.gguf import splits
from dsjax.text.tokenizer import PATTERNS

NAMES = (
    "deepseek-v3", "deepseek-llm", "deepseek-coder", "llama-bpe", "qwen2", "gpt-2", "kimi-k2",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_name_is_found_again(name):
    assert splits.recognize(splits.named(name)) == (name, True)


def sequence(*parts):
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*parts, to_bytes])


def test_other_spelling_is_recognized():
    """DeepSeek-Coder's tokenizer.json has the digits as a part of their own kind."""
    patterns = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert splits.recognize(sequence(*parts, digits)) == ("deepseek-coder", True)


def test_own_tokenizer_has_a_nearest_one():
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS]
    assert splits.recognize(sequence(*parts)) == ("deepseek-v3", False)


@pytest.mark.parametrize(
    "splitter",
    [
        sequence(),
        sequence(pre_tokenizers.Split(Regex(r"\p{N}{1,4}"), "isolated")),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Whitespace(),
    ],
)
def test_others_are_not(splitter):
    assert splits.recognize(splitter) == (None, False)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"'falcon' is not one of deepseek-v3"):
        splits.named("falcon")
