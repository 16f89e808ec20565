"""Pictures in messages: what is read of a body, and what the engine is given."""

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest

from dsjax.checkpoint import load
from dsjax.infer.looking import look_by, open_format
from dsjax.infer.pictured import PICTURES
from dsjax.text.chat import Message
from tests.closeness import LOGITS, assert_close
from tests.golden import vl2
from tests.serve.scripted import ask, make_service, make_site, post, running
from tests.vision import toy

CHAT = "/v1/chat/completions"


def png(seed, size=(9, 9)):
    data = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    PIL.Image.fromarray(noise).save(data, "png")
    return data.getvalue()


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def part(data, **more):
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else url(data)}
            | more}  # fmt: skip


def text(said):
    return {"type": "text", "text": said}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load.open_checkpoint(toy.write(tmp_path_factory.mktemp("janus")))


@pytest.fixture
def served(checkpoint):
    """A site of a model that sees, whose language model is a script; its engine and its format."""
    form = open_format(checkpoint)
    service = make_service(checkpoint.path, form=form, context=512)
    service.looking = look_by(form, checkpoint, None, "float32")
    with running(service, lambda request: form.vocabulary.coder.encode(" a cat")) as engine:
        yield make_site(service), engine, form


def test_the_page_is_told_how_many_it_may_send(served):
    health = ask(served[0], "GET", "/health").json()
    assert (health["pictures"], health["max_body"]) == (64, 8 << 20)


def test_pictures_reach_the_engine_as_embeddings_before_their_text(served, checkpoint):
    site, engine, form = served
    body = post(site, CHAT, n=2, messages=[
        {"role": "user", "content": [part(png(0), detail="auto"), text("one"), part(png(1))]},
        {"role": "user", "content": [part(png(0)), text("two")]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "three"},
    ])  # fmt: skip
    assert body["choices"][0]["message"]["content"] == " a cat"
    shown = [form.decode(png(seed), "") for seed in (0, 1, 0)]
    messages = [
        Message("user", "one\n\ntwo", {PICTURES: shown}),
        Message("assistant", "yes"),
        Message("user", "three"),
    ]
    looking = look_by(form, checkpoint, None, "float32")
    wanted = form.encode(messages)
    given = looking.given(messages, wanted)
    for request in engine.requests:
        assert list(request.prompt) == wanted
        np.testing.assert_array_equal(request.given.places, given.places)
        assert_close(request.given.values, given.values, LOGITS)
    assert len(engine.requests) == 2


def test_a_beginning_of_a_reply_follows_a_space(served):
    site, engine, form = served
    post(site, CHAT, messages=[
        {"role": "user", "content": [part(png(0))]},
        {"role": "assistant", "content": "It is", "prefix": True},
    ])  # fmt: skip
    spelt = form.vocabulary.coder.decode(engine.requests[0].prompt, skip_special=False)
    assert spelt.endswith("<|Assistant|>: It is")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([part("https://example.org/a.png")], "url must be the picture itself"),
        ([part("file:///etc/passwd")], "url must be the picture itself"),
        ([part("data:image/png,xyz")], "url must be in base64"),
        ([part("data:image/png;base64,@@@@")], "url is not base64"),
        ([part("data:image/png;base64,\u00e9A==")], "url is not base64"),
        ([part(b"GIF87a")], r"content\[0\].image_url.url is "),
        ([part(png(0)[:60])], "is damaged or not supported"),
        ([part(png(0), detail="huge")], "detail must be one of auto, low, high"),
        ([part(png(0), file_id="1")], "file_id is not a field"),
        ([{"type": "image_url"}], "image_url must be an object"),
        ([{"type": "input_audio"}], r"this model reads text and pictures \(image_url\)"),
        ([part(png(0))] * 65, "have 65 pictures; at most 64"),
    ],
)
def test_what_is_no_picture_is_refused(served, content, error):
    site, engine, _ = served
    body = {"messages": [{"role": "user", "content": content}]}
    response = ask(site, "POST", CHAT, json=body)
    failure = response.json()["error"]
    assert response.status_code == 422 and not engine.requests
    assert failure["param"].startswith("messages"), failure
    assert re.search(error, failure["message"]), failure


def test_a_picture_is_for_a_user(served):
    site, _, _ = served
    messages = [{"role": "system", "content": [part(png(0))]}, {"role": "user", "content": "x"}]
    response = ask(site, "POST", CHAT, json={"messages": messages})
    assert response.status_code == 422
    assert "is for a user's message" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
        {"thinking": {"type": "enabled"}},
    ],
)
def test_what_models_that_see_cannot_do_is_refused(served, more):
    site, engine, _ = served
    body = {"messages": [{"role": "user", "content": "x"}], **more}
    assert ask(site, "POST", CHAT, json=body).status_code == 422 and not engine.requests


def test_a_server_that_starts_says_so(served):
    site, _, _ = served
    site._service.looking = None
    body = {"messages": [{"role": "user", "content": [part(png(0))]}]}
    assert ask(site, "POST", CHAT, json=body).status_code == 503


def test_tiles_reach_the_engine_and_a_beginning_follows_the_colon(tmp_path):
    """Of DeepSeek-VL2."""
    checkpoint = load.open_checkpoint(vl2.write(tmp_path, vl2.CASES["heads"]))
    form = open_format(checkpoint)
    service = make_service(checkpoint.path, form=form, context=512)
    service.looking = look_by(form, checkpoint, None, "float32")
    reply = "<|ref|>cat<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"
    with running(service, lambda request: form.vocabulary.coder.encode_control(reply)) as engine:
        site, where = make_site(service), part(png(0, (66, 44)))
        body = post(site, CHAT, messages=[{"role": "user", "content": [where, text("see")]}])
        assert body["choices"][0]["message"]["content"] == reply
        shown = {PICTURES: [form.decode(png(0, (66, 44)), "")]}
        assert shown[PICTURES][0].grid == (2, 3)
        wanted = form.encode([Message("user", "see", shown)])
        (request,) = engine.requests
        assert list(request.prompt) == wanted and len(request.given.places) == 12 + 1 + 9 * 7
        turn = {"role": "user", "content": [where]}
        post(site, CHAT, messages=[turn, {"role": "assistant", "content": "a", "prefix": True}])
        spelt = form.vocabulary.coder.decode(engine.requests[1].prompt, skip_special=False)
        assert spelt.endswith("<|Assistant|>:a")
        twice = [where, text("<image> and <image>")]
        response = ask(site, "POST", CHAT, json={"messages": [{"role": "user", "content": twice}]})
        assert response.status_code == 422
        assert "spells <image> 2 times and has 1 picture" in response.json()["error"]["message"]
