"""Conversations with DeepSeek-VL 7B in DeepSeek's own layout, against DeepSeek's own code
(tests/golden/vl7b.npz).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import load
from dsjax.checkpoint.eyes import load_eyes
from dsjax.generate.engine import Engine
from dsjax.generate.request import Request
from dsjax.generate.sampling import Sampling
from dsjax.infer.looking import open_looking
from dsjax.infer.pictured import PICTURES
from dsjax.model.transformer import Embeddings
from dsjax.text.chat import Message
from dsjax.vision import pictures
from dsjax.vision.pictures import Picture
from tests.closeness import LOGITS, assert_close
from tests.golden import vl7b


@pytest.fixture(scope="module")
def golden():
    with np.load(vl7b.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        vl7b.shrink(patch)
        return load.open_checkpoint(vl7b.write(tmp_path_factory.mktemp("vl7b")))


@pytest.fixture(scope="module")
def rules(checkpoint):
    return pictures.read_rules(checkpoint.path, low=vl7b.LOW)


@pytest.fixture(scope="module")
def seen(checkpoint, rules):
    """A format, a conversation, its ids and what replaces its placeholders."""
    shown = [vl7b.picture(place) for place in range(len(vl7b.SIZES))]
    squares = [Picture(pictures.largest(each, rules)[None], each.size) for each in shown]
    messages = [Message("user", vl7b.QUESTION, {PICTURES: squares})]
    looking = open_looking(checkpoint, None, "float32")
    prompt = looking.encode(messages)
    return looking, prompt, looking.given(messages, prompt)


def test_names_are_deepseeks(golden, checkpoint):
    found = {f"{info.name} {[*info.shape]}" for info in checkpoint.hf.files.tensors.values()}
    assert found == set(golden["names"])


def test_pictures_are_resized_as_numbers(golden, rules):
    shown = [vl7b.picture(place) for place in range(len(vl7b.SIZES))]
    squares = np.stack([pictures.largest(each, rules) for each in shown])
    small, large = pictures.inputs(squares, rules)
    some = slice(None, None, vl7b.EVERY)
    np.testing.assert_array_equal(large[:, some, some], golden["large"])
    np.testing.assert_allclose(small[:, some], golden["shrunk"], atol=2e-6)


def test_towers_are_deepseeks(golden, rules, checkpoint):
    eyes = load_eyes(checkpoint)
    shown = [vl7b.picture(place) for place in range(len(vl7b.SIZES))]
    squares = np.stack([pictures.largest(each, rules) for each in shown])
    low, high = pictures.inputs(squares, rules)
    some = slice(None, None, vl7b.EVERY)
    assert_close(jax.jit(eyes.tower)(low)[:, some], golden["low"], LOGITS, "SigLIP")
    assert_close(jax.jit(eyes.high)(high)[:, some], golden["high"], LOGITS, "SAM")


def test_features_and_logits_are_deepseeks(golden, checkpoint, seen):
    _, prompt, given = seen
    assert list(prompt) == golden["ids"].tolist()
    features = given.values.reshape(len(vl7b.SIZES), -1, vl7b.DIM)
    assert_close(features[:, :: vl7b.EVERY], golden["features"], LOGITS, "features")
    ids = np.array(prompt, np.int32)[None]
    mask, values = np.zeros(ids.shape, bool), np.zeros((*ids.shape, vl7b.DIM), np.float32)
    mask[0, given.places], values[0, given.places] = True, given.values
    language = load.load(checkpoint)
    embeddings = Embeddings(jnp.asarray(mask), jnp.asarray(values))
    hidden = language.hidden(jnp.asarray(ids), embeddings=embeddings).main_BTD
    logits = language.logits(hidden[:, -vl7b.POSITIONS :])[0]
    assert_close(logits, golden["logits"], LOGITS, "logits")


def test_greedy_replies_are_deepseeks(golden, checkpoint, seen):
    _, prompt, given = seen
    request = Request(tuple(prompt), vl7b.NEW_TOKENS, Sampling(temperature=0.0), given=given)
    (reply,) = Engine(load.load(checkpoint)).complete([request])
    assert list(reply.tokens) == golden["tokens"].tolist()
