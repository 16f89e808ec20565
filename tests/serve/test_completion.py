"""Text continued, echoed and filled in."""

import contextlib

import numpy as np
import pytest

from dsjax.serve.scoring import Scored
from dsjax.text.tokenizer import BOS, FIM_BEGIN, FIM_END, FIM_HOLE
from tests.serve.scripted import ask, events, make_service, make_site, post, running
from tests.serve.test_chat import STOP, spell

PATH = "/v1/completions"


class Scorer:
    """Log-probabilities that tell their places."""

    def score(self, ids):
        n = len(ids) - 1
        tops = np.tile(np.arange(20, dtype=np.int32) + 30, (n, 1))
        return Scored(-np.arange(1, n + 1, dtype=np.float32), tops, -tops.astype(np.float32))


@pytest.fixture
def start(folders):
    with contextlib.ExitStack() as stack:

        def start(reply, form="base"):
            service = make_service(folders[form], scorer=Scorer())
            coder = service.vocabulary.coder
            engine = stack.enter_context(running(service, lambda request: spell(coder, reply)))
            return make_site(service), engine, coder

        yield start


def test_usage_counts_equal_prompts_each_and_a_prompt_once(start):
    site, _, coder = start("x")
    body = post(site, PATH, prompt=["Some", "Some"], n=2, max_tokens=1)
    assert body["usage"]["prompt_tokens"] == 2 * (len(coder.encode("Some")) + 1)
    assert body["usage"]["completion_tokens"] == 4


def test_text_is_continued(start):
    site, engine, coder = start([" and more text", STOP])
    body = post(site, PATH, model="tiny", prompt="Some text")
    (choice,) = body["choices"]
    assert choice["text"] == " and more text" and choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None and body["object"] == "text_completion"
    assert engine.requests[0].prompt == (coder.control[BOS], *coder.encode("Some text"))
    assert engine.requests[0].max_new_tokens == 16
    chunks = events(ask(site, "POST", PATH, json={"prompt": "Some text", "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " and more text"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]


def test_prompts_are_texts_or_ids_and_may_be_several(start):
    site, engine, coder = start("x")
    body = post(site, PATH, prompt=["Some", "text"], n=2, max_tokens=1)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    prompts = [request.prompt[1:] for request in engine.requests]
    assert prompts == [tuple(coder.encode(t)) for t in ("Some", "Some", "text", "text")]
    assert body["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2]) + 2
    post(site, PATH, prompt=[7, 8, 9])
    post(site, PATH, prompt=[[7, 8], [9]])
    post(site, PATH)
    assert [r.prompt for r in engine.requests[4:]] == [
        (7, 8, 9),
        (7, 8),
        (9,),
        (coder.control[BOS],),
    ]


def test_prompt_is_echoed_with_its_log_probabilities(start):
    site, _, coder = start(" more")
    ids = coder.encode("Some text")
    new = coder.encode(" more")
    body = post(site, PATH, prompt="Some text", echo=True, logprobs=2, max_tokens=len(new))
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "Some text more"
    assert "".join(logprobs["tokens"]) == f"{BOS}Some text more"
    assert logprobs["token_logprobs"] == [None, *range(-1, -len(ids) - 1, -1), *[-0.5] * len(new)]
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"][1]) == 2
    assert logprobs["text_offset"][:2] == [0, 0]  # the text leaves the begin token out
    for token, place in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert choice["text"].startswith(token, place)
    assert len(set(map(len, logprobs.values()))) == 1
    body = post(site, PATH, prompt="Some text", echo=True, max_tokens=1)
    assert body["choices"][0]["text"].startswith("Some text") and not body["choices"][0]["logprobs"]


def test_impossible_tokens_of_a_prompt_have_log_probabilities_that_json_can_hold(
    start, monkeypatch
):
    def score(scorer, ids):
        n = len(ids) - 1
        tops = np.tile(np.arange(20, dtype=np.int32) + 30, (n, 1))
        never = np.full((n, 20), -np.inf, np.float32)
        return Scored(np.full(n, np.nan, np.float32), tops, never)

    monkeypatch.setattr(Scorer, "score", score)
    site, _, coder = start("x")
    body = post(site, PATH, prompt="Some text", echo=True, logprobs=1, max_tokens=0)
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None] + [-9999.0] * len(coder.encode("Some text"))
    assert list(logprobs["top_logprobs"][1].values()) == [-9999.0]


def test_tokens_of_one_character_lie_where_it_begins(start):
    site, _, coder = start("x")
    ids = [*coder.encode("a\U0001f600b"), *coder.encode("c")]
    body = post(site, PATH, prompt=ids, echo=True, logprobs=1, max_tokens=1)
    (choice,) = body["choices"]
    tokens, places = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert tokens.count("\ufffd") > 1  # the tokenizer cuts the character
    assert places == [0, *[1] * (len(ids) - 3), 2, 3, 4]
    assert choice["text"] == "a\U0001f600bcx"


def test_hole_is_filled(start):
    site, engine, coder = start(["more", STOP])
    body = post(site, "/beta/completions", prompt="Some ", suffix=" text", max_tokens=9)
    assert body["choices"][0]["text"] == "more"
    control = coder.control
    assert engine.requests[0].prompt == (
        control[BOS], control[FIM_BEGIN], *coder.encode("Some "), control[FIM_HOLE],
        *coder.encode(" text"), control[FIM_END],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": [640]}, 422, "prompt has ids outside the vocabulary of 640"),
        ({"prompt": [1.5]}, 422, "prompt must be a text, a list of token ids"),
        ({"prompt": ["x"] * 129}, 422, "prompt has 129 texts"),
        ({"prompt": "x", "suffix": "y", "echo": True}, 422, "echo does not go together"),
        ({"prompt": "x", "best_of": 3}, 422, "best_of must equal n=1"),
        ({"prompt": "x", "logprobs": 21}, 422, "logprobs must be a whole number"),
        ({"prompt": [5] * 100}, 400, "the prompt has 100 tokens"),
        ({"prompt": [5] * 13}, 400, "thirteen tokens"),
        ({"prompt": "x", "messages": []}, 422, "messages is not a field"),
    ],
)
def test_completion_that_cannot_be_served_is_told_why(start, body, status, message):
    site, _, _ = start("x")
    response = ask(site, "POST", PATH, json=body)
    assert response.status_code == status and message in response.json()["error"]["message"]


def test_nothing_new_may_be_asked_for(start):
    """lm-evaluation-harness asks so for the log-probabilities of a prompt alone."""
    site, _, coder = start("x")
    n = len(coder.encode("Some text"))
    body = post(site, PATH, prompt="Some text", echo=True, logprobs=1, max_tokens=0)
    (choice,) = body["choices"]
    assert choice["text"] == "Some text" and len(choice["logprobs"]["tokens"]) == n + 1
    assert choice["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 0
