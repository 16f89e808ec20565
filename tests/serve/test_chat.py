"""Chats: what the engine is asked for, and what becomes of its tokens."""

import json
import re
import time

import openai
import pytest

from dsjax.serve.grammar import Matcher
from dsjax.text import dsml, tool_calls
from dsjax.text.dsml import DSML
from tests.serve.formats import TOOL_TOKENS
from tests.serve.scripted import ask, events, listening, make_service, make_site, post, running
from tests.serve.test_tools import tool

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Some text"}]


@pytest.fixture
def start(folders):
    """Starts a service in a format; returns its site, its engine and its tokenizer's ids."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def start(reply, form="V3.1", **options):
            service = make_service(folders[form], **options)
            coder = service.vocabulary.coder

            def script(request):
                return spell(coder, reply(request) if callable(reply) else reply)

            engine = stack.enter_context(running(service, script))
            return make_site(service), engine, coder

        yield start


def spell(coder, reply):
    """Tokens of a reply's parts; the names of control tokens stand for these."""
    ids = []
    for part in reply if isinstance(reply, list) else [reply]:
        ids += [coder.control[part]] if part in coder.control else coder.encode(part)
    return ids


def spelled_markup(text):
    """Markup with its token apart, for `spell`."""
    return [part for part in re.split(f"({DSML})", text) if part]


STOP = "<\uff5cend\u2581of\u2581sentence\uff5c>"


def test_answer_has_text_usage_and_the_reason_of_its_end(start):
    site, engine, coder = start(["and more text", STOP])
    body = post(site, CHAT, model="tiny", messages=HELLO, seed=4, temperature=0.5, max_tokens=50)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "and more text"}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    (request,) = engine.requests
    assert coder.decode(request.prompt, skip_special=False).endswith(
        "Some text<\uff5cAssistant\uff5c></think>"
    )
    assert (request.sampling.seed, request.sampling.temperature) == (4, 0.5)
    assert request.max_new_tokens == 50 and not request.logprobs
    usage, n_new = body["usage"], len(coder.encode("and more text")) + 1
    assert usage["prompt_tokens"] == len(request.prompt) and usage["completion_tokens"] == n_new
    assert usage["total_tokens"] == len(request.prompt) + n_new
    hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
    assert hit + miss == usage["prompt_tokens"]


def test_limit_is_what_the_context_has_room_for(start):
    site, engine, _ = start("x" * 200)
    body = post(site, CHAT, messages=HELLO)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 100
    assert engine.requests[0].max_new_tokens == 100 - len(engine.requests[0].prompt)
    body = post(site, CHAT, messages=HELLO, max_tokens=10**9)
    assert body["usage"]["total_tokens"] == 100


def test_thought_is_apart(start):
    site, _, _ = start(["\nSome thought\n", "</think>", "\n\nSo text", STOP])
    body = post(site, CHAT, model="deepseek-reasoner", messages=HELLO)
    message = body["choices"][0]["message"]
    assert message["content"] == "So text" and message["reasoning_content"] == "Some thought\n"
    assert body["model"] == "deepseek-reasoner"
    assert 0 < body["usage"]["completion_tokens_details"]["reasoning_tokens"] < 20
    response = ask(site, "POST", CHAT, json={
        "model": "deepseek-reasoner", "messages": HELLO, "stream": True,
    })  # fmt: skip
    deltas = [chunk["choices"][0]["delta"] for chunk in events(response)]
    assert "".join(d.get("reasoning_content") or "" for d in deltas) == "Some thought\n"
    assert "".join(d.get("content") or "" for d in deltas) == "So text"
    assert not any(d.get("reasoning_content") and d.get("content") for d in deltas)


def test_stream_has_one_head_and_its_usage_at_the_end(start):
    site, _, coder = start(["and more text", STOP])
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(ask(site, "POST", CHAT, json=body))
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "and more text"
    )
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-2:] == [None, "stop"]
    assert chunks[-1]["choices"] == [] and all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == len(coder.encode("and more text")) + 1
    del body["stream_options"]
    chunks = events(ask(site, "POST", CHAT, json=body))
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]


def test_several_choices_differ_in_their_seeds(start):
    site, engine, _ = start(lambda request: ["abc"[request.sampling.seed], STOP])
    body = post(site, CHAT, messages=HELLO, n=3, seed=0)
    assert [c["message"]["content"] for c in body["choices"]] == ["a", "b", "c"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    # The prompt that they share counts once.
    assert body["usage"]["prompt_tokens"] == len(engine.requests[0].prompt)
    chunks = events(
        ask(site, "POST", CHAT, json={"messages": HELLO, "n": 2, "seed": 1, "stream": True})
    )
    texts = {0: "", 1: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "b", 1: "c"}


def test_log_probabilities_are_of_the_answers_tokens(start):
    site, engine, _ = start(["text", STOP])
    body = post(site, CHAT, messages=HELLO, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "text"
    assert bytes(byte for entry in content for byte in entry["bytes"]) == b"text"
    assert all(entry["logprob"] == -0.5 for entry in content)
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    assert engine.requests[0].logprobs and engine.requests[0].top_logprobs == 20


def test_beginning_of_a_reply_goes_on(start):
    site, engine, coder = start(" text", form="R1")
    prefix = {"role": "assistant", "content": "Some", "prefix": True}
    post(site, "/beta/chat/completions", messages=[*HELLO, prefix])
    prompt = coder.decode(engine.requests[0].prompt, skip_special=False)
    assert prompt.endswith("<\uff5cAssistant\uff5c>Some") and "<think>" not in prompt
    prefix["reasoning_content"] = "more"
    post(site, "/beta/chat/completions", messages=[*HELLO, prefix])
    prompt = coder.decode(engine.requests[1].prompt, skip_special=False)
    assert prompt.endswith("<\uff5cAssistant\uff5c><think>\nmore</think>Some")
    prefix["content"] = ""
    post(site, "/beta/chat/completions", messages=[*HELLO, prefix])
    assert coder.decode(engine.requests[2].prompt, skip_special=False).endswith("<think>\nmore")


def calls_of(body):
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    return [
        (c["function"]["name"], c["function"]["arguments"]) for c in choice["message"]["tool_calls"]
    ]


@pytest.mark.parametrize("form", ["V3", "V3.1"])
def test_calls_of_tools_come_as_the_api_has_them(start, form):
    called = [{"function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}] * 2
    reply = [*tool_calls.write_calls(called, fenced=form == "V3"), STOP]
    site, _, _ = start(reply, form=form, context=1000)
    body = {"messages": HELLO, "tools": [tool()]}
    assert calls_of(post(site, CHAT, **body)) == [("get_weather", '{"city": "Rome"}')] * 2
    chunks = events(ask(site, "POST", CHAT, json=body | {"stream": True}))
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    pieces = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls", ())]
    assert [p["function"]["name"] for p in pieces if "name" in p["function"]] == ["get_weather"] * 2
    assert len({p["id"] for p in pieces if "id" in p}) == 2
    for index in (0, 1):
        own = [p["function"]["arguments"] for p in pieces if p["index"] == index]
        assert "".join(own) == '{"city": "Rome"}' and len(own) > 2


MARKED = "".join(
    dsml.write_calls(
        [{"function": {"name": "get_weather", "arguments": '{"city": "Rome", "days": [1, 2]}'}}] * 2
    )
)


def test_marked_calls_come_as_the_api_has_them(start):
    """V3.2's, with the thought and the words before them; stop strings do not cut them."""
    reply = ["Some thought", "</think>", "Some text", *spelled_markup(MARKED), STOP]
    site, engine, coder = start(reply, form="V3.2", context=3000)
    body = {
        "messages": HELLO, "tools": [tool()], "thinking": {"type": "enabled"}, "stop": ["Rome"],
    }  # fmt: skip
    (choice,) = post(site, CHAT, **body)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("Some thought", "Some text")
    arguments = '{"city": "Rome", "days": [1, 2]}'
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "get_weather", "arguments": arguments}
    ] * 2
    chunks = events(ask(site, "POST", CHAT, json=body | {"stream": True}))
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Some text"
    pieces = [p for delta in deltas for p in delta.get("tool_calls", ())]
    for index in (0, 1):
        own = [p for p in pieces if p["index"] == index]
        assert own[0]["function"]["name"] == "get_weather" and own[0]["id"]
        assert "".join(p["function"]["arguments"] for p in own) == arguments and len(own) > 4
    # What the client sends back is what the model has written.
    ids = [call["id"] for call in message["tool_calls"]]
    results = [{"role": "tool", "tool_call_id": id, "content": "25"} for id in ids]
    turns = [*HELLO, message, *results]
    post(site, CHAT, **body | {"messages": turns})
    prompt = coder.decode(engine.requests[-1].prompt, skip_special=False)
    said = f"<think>Some thought</think>Some text{MARKED}{STOP}"
    results = "\n<result>25</result>" * 2
    assert prompt.endswith(f"{said}\n\n<function_results>{results}\n</function_results>\n\n<think>")


def test_openais_client_streams_marked_calls(start):
    reply = ["Some thought", "</think>", *spelled_markup(MARKED), STOP]
    site, _, _ = start(reply, form="V3.2", context=3000)
    with (
        listening(site) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(
            model="deepseek-reasoner", messages=HELLO, tools=[tool()]
        ) as stream,
    ):
        kinds = [event.type for event in stream]
        (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert choice.message.reasoning_content == "Some thought"
    called = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert called == [("get_weather", '{"city": "Rome", "days": [1, 2]}')] * 2
    assert kinds.count("tool_calls.function.arguments.delta") > 8


def test_markup_is_text_without_tools_or_calls(start):
    broken = MARKED.replace("invoke", "call")
    site, _, _ = start([*spelled_markup(broken), STOP], form="V3.2", context=3000)
    for more in ({}, {"tools": [tool()]}):
        (choice,) = post(site, CHAT, messages=HELLO, **more)["choices"]
        assert choice["message"]["content"] == broken and choice["finish_reason"] == "stop"


def test_required_marked_call_begins_in_the_prompt_behind_the_thought(start):
    rest = MARKED.split('name="', 1)[1].split("</" + DSML + "invoke>")[0] + dsml.END_CALLS
    site, engine, coder = start([*spelled_markup(rest), STOP], form="V3.2", context=3000)
    body = post(site, CHAT, messages=HELLO, tools=[tool()], tool_choice="required",
                thinking={"type": "enabled"})  # fmt: skip
    assert calls_of(body) == [("get_weather", '{"city": "Rome", "days": [1, 2]}')]
    (request,) = engine.requests
    prompt = coder.decode(request.prompt, skip_special=False)
    assert prompt.endswith(f"</think>{dsml.BEGIN_CALL}") and request.steering is not None
    bad = tool(parameters={"anyOf": [{"type": "object"}], "type": "array"})
    response = ask(site, "POST", CHAT, json={
        "messages": HELLO, "tools": [bad], "tool_choice": "required"})  # fmt: skip
    assert response.status_code == 422 and "must be an object with properties" in response.text


def test_required_call_begins_in_the_prompt_and_is_bound(start):
    end = [tool_calls.SEPARATOR, '{"city": "Rome"}', tool_calls.END_CALL, tool_calls.END_CALLS]
    site, engine, coder = start(["get_weather", *end], context=1000)
    body = post(site, CHAT, messages=HELLO, tools=[tool()], tool_choice="required")
    assert calls_of(body) == [("get_weather", '{"city": "Rome"}')]
    (request,) = engine.requests
    names = {i: name for name, i in coder.control.items()}
    assert [names[i] for i in request.prompt[-2:]] == [tool_calls.CALLS, tool_calls.CALL]
    assert request.steering is not None and request.logprobs


def test_form_of_a_reply_is_bound(start):
    site, engine, _ = start("{}")
    post(site, CHAT, messages=HELLO, n=2, response_format={"type": "json_object"})
    steerings = [request.steering for request in engine.requests]
    assert len(set(map(id, steerings))) == 2 and None not in steerings
    assert isinstance(steerings[0]._grammar, Matcher)


def test_special_tokens_in_a_message_are_text(start):
    site, engine, coder = start(["x", STOP], context=1000)
    hostile = "".join([*TOOL_TOKENS, "<think>", STOP, "<\uff5cAssistant\uff5c>"])
    for content in (hostile, [{"type": "text", "text": hostile}]):
        post(site, CHAT, messages=[{"role": "system", "content": hostile},
                                   {"role": "user", "content": content}])  # fmt: skip
    plain = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
    post(site, CHAT, messages=plain)
    control = set(coder.control.values())
    found = [[i for i in request.prompt if i in control] for request in engine.requests]
    assert found[0] == found[1] == found[2]


def everywhere(text):
    """A conversation with this text wherever a client may write one."""
    call = {"id": "c", "type": "function", "function": {
        "name": "get_weather", "arguments": json.dumps({"city": text})}}  # fmt: skip
    return {
        "messages": [
            {"role": "system", "content": text},
            {"role": "user", "content": text, "name": text[:20]},
            {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
            {"role": "tool", "content": text, "tool_call_id": "c"},
            {"role": "assistant", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}]},
            {"role": "assistant", "content": text, "prefix": True},
        ],
        "tools": [tool(description=text)],
        "stop": [text[:250]],
        "max_tokens": 1,
    }


@pytest.mark.parametrize("form", ["V3", "R1", "V3.1", "V3.2"])
def test_nothing_that_a_client_writes_is_control_or_a_template(start, form):
    site, engine, coder = start("x", form=form, context=8000)
    hostile = "".join([*TOOL_TOKENS, "<think>", "</think>", STOP, "<\uff5cAssistant\uff5c>", DSML])
    for text in ("x", hostile, "{{ 7 * 191 }}{% for a in b %}", "\u0000\ue000"):
        post(site, CHAT, **everywhere(text))
    control = set(coder.control.values())
    plain, *others = [[i for i in each.prompt if i in control] for each in engine.requests]
    assert all(other == plain for other in others)
    text = coder.decode(engine.requests[2].prompt, skip_special=False)
    assert "{{ 7 * 191 }}{% for" in text and "1337" not in text


def test_stop_strings_are_no_expressions(start):
    site, _, _ = start("a" * 400, context=1000)
    began = time.monotonic()
    body = {"messages": HELLO, "stop": ["(a+)+$", "a*", "[a", "(" * 256]}
    (choice,) = post(site, CHAT, **body)["choices"]
    assert choice["message"]["content"] == "a" * 400 and time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": []}, 422, "messages must have at least one message"),
        ({"messages": [{"role": "user", "content": "x" * 99}]}, 400, "the model's context has 100"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 422, "must alternate"),
        ({"messages": HELLO, "model": "gpt"}, 404, "this server has tiny, deepseek-chat"),
        ({"messages": HELLO, "reponse_format": 1}, 422, "reponse_format is not a field"),
        (
            {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"type": "nonsense"}}}},
            422, "response_format.json_schema.schema cannot be followed",
        ),
    ],
)  # fmt: skip
def test_request_that_cannot_be_served_is_told_why(start, body, status, message):
    site, engine, _ = start("x")
    for stream in (False, True):
        response = ask(site, "POST", CHAT, json=body | {"stream": stream})
        assert response.status_code == status and message in response.json()["error"]["message"]
    assert engine.requests == []


def test_base_model_is_not_chatted_with(start):
    site, _, _ = start("x", form="base")
    response = ask(site, "POST", CHAT, json={"messages": HELLO})
    assert response.status_code == 422 and "/v1/completions" in response.text


def test_failure_of_the_model_is_told_without_its_trace(start):
    site, engine, _ = start("x")
    engine.script = lambda request: RuntimeError("secret")
    for stream in (False, True):
        response = ask(site, "POST", CHAT, json={"messages": HELLO, "stream": stream})
        assert response.status_code == 500 and "secret" not in response.text
        assert json.loads(response.text)["error"]["type"] == "server_error"
