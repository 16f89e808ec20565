"""Whatever a body holds, it is answered: with a completion, or with an error in OpenAI's shape."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.scripted import ask, make_service, make_site, running

NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
SHARED = (
    "model max_tokens max_completion_tokens temperature top_p top_k min_p stop n seed stream "
    "stream_options logprobs frequency_penalty presence_penalty logit_bias user user_id metadata"
).split()
CHAT = (
    "messages tools tool_choice response_format thinking reasoning_effort top_logprobs "
    "chat_template_kwargs"
).split()
TEXT = ["prompt", "suffix", "echo", "best_of"]
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


@pytest.fixture(scope="module")
def site(folders):
    with contextlib.ExitStack() as stack:
        service = make_service(folders["V3.1"])
        stack.enter_context(running(service, lambda request: [30] * 100))
        yield make_site(service)


@pytest.mark.parametrize("path", ROUTES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_body_is_answered(site, path, data):
    chat = {"messages": [{"role": "user", "content": "Some"}]}
    base = {"prompt": "Some"} if "prompt" in ROUTES[path] else chat
    names = st.sampled_from(SHARED + ROUTES[path])
    body = base | {"max_tokens": 3} | data.draw(st.dictionaries(names, VALUES, max_size=3))
    response = ask(site, "POST", path, json=body)
    assert response.status_code in (200, 400, 404, 422), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert len(response.text) < 2000
