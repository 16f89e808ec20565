"""Bodies of chats: messages, thinking and the form of the reply."""

import dataclasses

import pytest

from dsjax.serve.chat_request import read_chat
from dsjax.serve.errors import ApiError
from dsjax.text.template import Template
from tests.serve.scripted import make_service

USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def services(folders):
    made = {name: make_service(folder) for name, folder in folders.items()}
    yield made
    for service in made.values():
        service.metrics.close()


def read(service, messages=(USER,), **values):
    return read_chat({"messages": list(messages), **values}, service, user="me")


def test_messages_are_read_with_their_parts(services):
    request = read(services["V3.1"], [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "me"},
        {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ])  # fmt: skip
    roles = [(message.role, message.content) for message in request.messages]
    assert roles == [("system", "Be brief."), ("user", "ab\n\nc"), ("assistant", ""), ("tool", "3")]
    assert request.messages[2].calls[0]["function"]["name"] == "f"
    assert request.messages[2].fields["reasoning_content"] == "Hm."
    assert request.prefix is None and request.top is None


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "wizard", "content": "x"}, r"messages\[0\].role must be one of"),
        ({"role": "user"}, r"messages\[0\].content is missing"),
        ({"role": "user", "content": 3}, r"messages\[0\].content must be a text or a list"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "this model reads text alone"),
        ({"role": "user", "content": "x", "prefix": True}, "is for the last message"),
        ({"role": "user", "content": "x", "x": 1}, r"messages\[0\].x is not a field"),
        ("hello", r"messages\[0\] must be an object"),
    ],
)
def test_malformed_message_is_refused(services, message, error):
    with pytest.raises(ApiError, match=error) as caught:
        read(services["V3.1"], [message])
    assert caught.value.status == 422


@pytest.mark.parametrize(
    ("form", "values", "thinking"),
    [
        ("V3.1", {}, None),
        ("V3.1", {"model": "deepseek-reasoner"}, True),
        ("V3.1", {"model": "deepseek-chat"}, False),
        ("V3.1", {"model": "deepseek-chat", "thinking": {"type": "enabled"}}, True),
        ("V3.1", {"reasoning_effort": "none"}, False),
        ("V3.1", {"reasoning_effort": "high"}, None),
        ("V3.1", {"chat_template_kwargs": {"thinking": True}}, True),
        ("R1", {"model": "deepseek-chat"}, None),
        ("R1", {"thinking": {"type": "enabled"}}, None),
        ("V3", {"model": "deepseek-reasoner"}, None),
        ("V3", {"thinking": {"type": "disabled"}}, None),
    ],
)
def test_thinking_is_what_is_asked_and_offered(services, form, values, thinking):
    assert read(services[form], **values).thinking is thinking


@pytest.mark.parametrize(
    ("source", "kind", "thinking"),
    [
        ("{{ thinking }}", "enabled", True),
        ("{{ enable_thinking }}", "disabled", False),
        ("<think>\n", "enabled", None),
        ("{% if '</think>' in x %}", "disabled", None),
        ("<think>\n", "disabled", "it always thinks"),
        ("{{ x }}", "enabled", "cannot be told to think"),
    ],
)
def test_template_says_what_is_offered(services, source, kind, thinking):
    service = services["V3.1"]
    form = dataclasses.replace(service.form, name="template", template=Template(source, "here"))
    service = dataclasses.replace(service, form=form)
    if isinstance(thinking, str):
        with pytest.raises(ApiError, match=thinking):
            read(service, thinking={"type": kind})
    else:
        assert read(service, thinking={"type": kind}).thinking is thinking


@pytest.mark.parametrize(
    ("form", "kind", "error"),
    [("R1", "disabled", "it always thinks"), ("V3", "enabled", "cannot be told to think")],
)
def test_thinking_that_the_model_has_no_choice_about_is_refused(services, form, kind, error):
    with pytest.raises(ApiError, match=error):
        read(services[form], thinking={"type": kind})


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "between 0 and 20"),
        ({"response_format": {"type": "xml"}}, "response_format.type must be one of"),
        ({"response_format": {"type": "regex"}}, "response_format.regex is missing"),
        ({"response_format": {"type": "json_schema"}}, "json_schema must be an object, not null"),
        ({"n": 33}, "n must be a whole number between 1 and 32"),
    ],
)
def test_field_out_of_range_is_refused(services, values, error):
    with pytest.raises(ApiError, match=error):
        read(services["V3.1"], **values)


def test_fields_that_change_nothing_are_accepted(services):
    request = read(
        services["V3.1"], store=True, metadata={"a": "b"}, parallel_tool_calls=False, user="u",
        response_format={"type": "text"}, logprobs=True,
    )  # fmt: skip
    assert request.grammar is None and request.top == 0 and request.options.user == "u"
