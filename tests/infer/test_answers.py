"""Text in, text out: what the engine is asked for, and what becomes of its tokens."""

import dataclasses
import logging

import numpy as np
import pytest

from dsjax.generate.request import Request
from dsjax.generate.sampling import Sampling
from dsjax.infer.answers import Generator, continue_tokens, default_sampling, replies
from dsjax.text.reply import ReplyReader
from tests.infer.scripted import CODER, ScriptedEngine, ids
from tests.text import released
from tests.text.released import write_checkpoint


def test_reply_asks_the_engine_for_what_fits(make):
    engine, generator = make("", context=100, max_new_tokens=30, sampling=Sampling(seed=3))
    assert list(generator.reply([5] * 60)) == []
    engine.replies.append([])
    assert list(generator.reply([5] * 90)) == []
    first, second = engine.requests
    assert (first.prompt, first.max_new_tokens) == ((5,) * 60, 30)
    assert (first.sampling, first.stop_ids) == (Sampling(seed=3), {1})
    assert second.max_new_tokens == 10
    with pytest.raises(ValueError, match="has 100 tokens, which fill the model's context of 100"):
        list(generator.reply([5] * 100))


def test_reply_hides_the_token_that_ends_it(make):
    engine, generator = make(f"yes{released.USER}")
    vocabulary = dataclasses.replace(generator.settings.vocabulary, stop_ids=frozenset({128803}))
    generator = Generator(engine, dataclasses.replace(generator.settings, vocabulary=vocabulary))
    assert "".join(piece.text for piece in generator.reply([5])) == "yes"


def test_a_stop_string_ends_the_engines_work(make):
    engine, generator = make("one. two. three.", stops=("two",))
    assert "".join(piece.text for piece in generator.reply([5])) == "one. "
    assert engine.cancelled == [1] and not engine.open


def test_tokens_continue_with_a_seed_a_row():
    engine = ScriptedEngine([7, 8, 1, 9], [1, 1, 2, 3])
    prompts = np.asarray([[1, 2, 3], [4, 5, 6]], np.int32)
    new = continue_tokens(engine, prompts, max_new_tokens=4, sampling=Sampling(0.5, seed=2**32 - 1))
    assert new.dtype == np.int32 and new.tolist() == [[7, 8, 1, 9], [1, 1, 2, 3]]
    assert [request.prompt for request in engine.requests] == [(1, 2, 3), (4, 5, 6)]
    assert [request.sampling.seed for request in engine.requests] == [2**32 - 1, 0]
    assert {request.sampling.temperature for request in engine.requests} == {0.5}
    assert {(request.max_new_tokens, request.stop_ids) for request in engine.requests} == {
        (4, frozenset())
    }


def test_replies_are_read_together_and_a_stop_string_frees_its_row():
    """Each with its own stop strings; the second ends at the token that its request stops at."""
    engine = ScriptedEngine(ids("one. two. three"), [*ids("ab"), 1], ids("xyz" * 4))
    requests = [Request((5,), 20), Request((6,), 20, stop_ids=frozenset({1})), Request((7,), 20)]
    readers = [ReplyReader(CODER, stops=stops) for stops in (["tw"], [], ["q"])]
    texts, ended = [""] * 3, []
    for index, pieces, done in replies(engine, requests, readers):
        texts[index] += "".join(piece.text for piece in pieces)
        ended += [index] if done else []
    assert texts == ["one. ", "ab", "xyz" * 4] and ended == [1, 0, 2]
    assert sorted(engine.cancelled) == [1, 2, 3] and not engine.open


def test_replies_left_early_are_cancelled():
    engine = ScriptedEngine(ids("one"), ids("two"))
    requests = [Request((5,), 20), Request((6,), 20)]
    for _ in replies(engine, requests, [ReplyReader(CODER), ReplyReader(CODER)]):
        break
    assert not engine.open


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        (None, Sampling()),
        # DeepSeek-R1's
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1},
            Sampling(temperature=0.6, top_p=0.95),
        ),
        ({"do_sample": False, "temperature": 0.6}, Sampling(temperature=0)),
        ({"top_k": 50, "min_p": 0.1, "temperature": None}, Sampling(top_k=50, min_p=0.1)),
        ({"temperature": 1}, Sampling()),
    ],
    ids=["no file", "R1", "greedy", "no do_sample", "integer"],
)
def test_sampling_follows_the_generation_config(tmp_path, config, sampling):
    configs = {} if config is None else {"generation_config": config}
    assert default_sampling(write_checkpoint(tmp_path, **configs)) == sampling


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": "hot"}, "generation_config.json: temperature='hot' is not a number"),
        ({"top_k": 1.5}, "generation_config.json: top_k=1.5 is not a number"),
        ({"top_p": True}, "generation_config.json: top_p=True is not a number"),
        ({"top_p": 2.0}, r"generation_config.json: top_p=2.0 must lie in \(0, 1\]"),
    ],
)
def test_sampling_rejects(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        default_sampling(write_checkpoint(tmp_path, generation_config=config))


def test_settings_that_would_change_the_text_are_named(tmp_path, caplog):
    """Those of the released files that change nothing are not."""
    config = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3, "top_k": 20}
    with caplog.at_level(logging.WARNING):
        found = default_sampling(write_checkpoint(tmp_path, generation_config=config))
    assert found == Sampling(top_k=20)
    (message,) = caplog.messages
    settings = "repetition_penalty=1.05, no_repeat_ngram_size=3"
    assert message.endswith(f"generation_config.json: dsjax does not apply {settings}")
    caplog.clear()
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "typical_p": None, "max_length": 20}
    neutral |= {"suppress_tokens": [], "bad_words_ids": [], "sequence_bias": {}}
    default_sampling(write_checkpoint(tmp_path, generation_config=neutral))
    assert not caplog.messages
