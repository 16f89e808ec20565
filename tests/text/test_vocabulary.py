"""Which tokens begin and end a text, from a checkpoint's own files."""

import pytest

from dsjax.text.vocabulary import open_vocabulary
from tests.text import released
from tests.text.released import VOCAB_SIZE, write_checkpoint


def test_begin_and_end_are_deepseeks_without_a_config(tmp_path):
    vocabulary = open_vocabulary(write_checkpoint(tmp_path), VOCAB_SIZE)
    assert (vocabulary.bos, vocabulary.eos) == (released.BOS, released.EOS)
    assert vocabulary.begins and vocabulary.stop_ids == {1} and vocabulary.config == {}
    assert vocabulary.plain_prompt("\n") == [0, released.LINE_BREAK]
    assert vocabulary.plain_prompt("") == [0]


@pytest.mark.parametrize(("control", "ids"), [(released.V3, None), (released.R1, (128798, 128799))])
def test_think_tokens_are_found_where_they_exist(tmp_path, control, ids):
    assert open_vocabulary(write_checkpoint(tmp_path, control), VOCAB_SIZE).think_ids == ids


def test_the_config_names_begin_and_end(tmp_path):
    """As a name or wrapped in an object, and also where tokenizer.json calls them no control
    tokens: then the text of a template may hold them all the same.
    """
    config = {"bos_token": {"content": "!"}, "eos_token": "#", "add_bos_token": False}
    vocabulary = open_vocabulary(write_checkpoint(tmp_path, tokenizer_config=config), VOCAB_SIZE)
    assert (vocabulary.bos, vocabulary.eos, vocabulary.begins) == ("!", "#", False)
    assert vocabulary.stop_ids == {5}
    assert vocabulary.coder.control["!"] == 3


@pytest.mark.parametrize(
    ("configs", "ids"),
    [
        ({"generation_config": {"eos_token_id": 7}}, {1, 7}),
        (
            {"generation_config": {"eos_token_id": [1, 7, 9]}, "config": {"eos_token_id": 4}},
            {1, 7, 9},
        ),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 4}}, {1, 4}),
        ({"config": {}}, {1}),
    ],
)
def test_stop_ids_come_from_the_generation_config_first(tmp_path, configs, ids):
    vocabulary = open_vocabulary(write_checkpoint(tmp_path, **configs), VOCAB_SIZE)
    assert vocabulary.stop_ids == ids


def test_a_tokenizer_without_begin_and_end_serves_too(tmp_path):
    vocabulary = open_vocabulary(write_checkpoint(tmp_path, {}), 259)
    assert (vocabulary.bos, vocabulary.eos, vocabulary.begins) == (None, None, False)
    assert vocabulary.stop_ids == frozenset()
    assert vocabulary.plain_prompt("a") == vocabulary.coder.encode("a")
    with pytest.raises(ValueError, match="prompt is empty and there is no begin token"):
        vocabulary.plain_prompt("")


def test_text_that_is_no_unicode_is_refused(tmp_path):
    """A command line with bytes that are no UTF-8 reaches Python as lone surrogates."""
    vocabulary = open_vocabulary(write_checkpoint(tmp_path), VOCAB_SIZE)
    with pytest.raises(ValueError, match="cannot encode a text"):
        vocabulary.plain_prompt("a\udcff")


def test_ids_beyond_the_model_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path)
    assert open_vocabulary(folder, 128805)
    message = (
        r"tokenizer.json has ids up to 128804, and the model has 128804 tokens \(0 to 128803\)"
    )
    with pytest.raises(ValueError, match=message):
        open_vocabulary(folder, 128804)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {},
            "has neither tokenizer.json nor tiktoken.model, so text cannot become tokens; copy "
            "the one that the release has$",
        ),
        (
            {"tokenizer": "version https://git-lfs.github.com/spec/v1"},
            "tokenizer.json is a Git LFS",
        ),
        (
            {"tokenizer": "{}"},
            "tokenizer.json is not a tokenizer that can be used: .*Model missing",
        ),
        ({"tokenizer_config": "[]"}, "tokenizer_config.json holds a JSON list"),
        (
            {"tokenizer_config": '{"eos_token": "<nope>"}'},
            "tokenizer_config.json: eos_token is '<nope>', which tokenizer.json does not have",
        ),
        ({"tokenizer_config": '{"eos_token": 1}'}, "eos_token is 1, which tokenizer.json"),
        (
            {"tokenizer_config": '{"add_bos_token": "no"}'},
            "tokenizer_config.json: add_bos_token='no' is not true or false; correct it, or remove",
        ),
        ({"tokenizer_config": '{"add_bos_token": 0}'}, "add_bos_token=0 is not true or false"),
        (
            {"generation_config": '{"eos_token_id": "1"}'},
            "generation_config.json: eos_token_id='1' is neither an id nor a list of ids",
        ),
    ],
)
def test_vocabulary_rejects(tmp_path, files, message):
    if files:
        write_checkpoint(tmp_path)
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_vocabulary(tmp_path, VOCAB_SIZE)
