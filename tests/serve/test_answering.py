"""Answers whose client leaves, waits long, or reads nothing."""

import asyncio
import contextlib
import json
import threading

import pytest

from tests.serve.scripted import make_service, make_site, running

CHAT = "/v1/chat/completions"


@pytest.fixture
def start(folders):
    with contextlib.ExitStack() as stack:

        def start():
            service = make_service(folders["V3.1"], context=200_000)
            engine = stack.enter_context(running(service, lambda request: [30] * 100_000))
            return make_site(service), engine

        yield start


def talk(site, body, leave):
    """Speaks ASGI; `leave` says after how many messages of the server the client goes, and awaits
    what must have come true before."""

    async def run():
        sent, gone = [], asyncio.Event()
        given = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if given:
                return given.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if leave is not None and len(sent) > leave:
                gone.set()

        if leave is None:
            asyncio.get_running_loop().call_later(0.2, gone.set)
        scope = {
            "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
            "query_string": b"", "headers": [(b"host", b"localhost")], "client": ("me", 1),
            "server": ("localhost", 80), "scheme": "http", "http_version": "1.1",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        await asyncio.wait_for(site(scope, receive, send), 20)
        return sent

    return asyncio.run(run())


async def until(holds):
    while not holds():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(("stream", "leave"), [(True, 3), (False, None)])
def test_request_ends_when_its_client_leaves(start, stream, leave):
    site, engine = start()
    if not stream:
        engine.gate.clear()
    body = {"messages": [{"role": "user", "content": "x"}], "stream": stream, "n": 2}
    talk(site, body, leave)
    asyncio.run(asyncio.wait_for(until(lambda: sorted(engine.cancelled) == [1, 2]), 20))
    assert not engine.open
    assert b"dsjax_aborted_total 2.0" in site._service.metrics.text()


def test_stream_that_fails_says_so_at_its_end(start, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("dsjax.serve.answering.KEEP_ALIVE_SECONDS", 0.02)
    site, engine = start()
    engine.script = lambda request: RuntimeError("secret")
    engine.gate.clear()
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    threading.Timer(0.3, engine.gate.set).start()
    sent = talk(site, body, 10_000)
    text = b"".join(message.get("body", b"") for message in sent).decode()
    assert text.startswith(": keep-alive") and "the model failed" in text and "secret" not in text
    assert "[DONE]" not in text
    lines = [each.getMessage() for each in caplog.records if each.name == "dsjax.serve.access"]
    assert "the model failed" in json.loads(lines[-1])["error"]


def test_waiting_stream_is_kept_alive(start, monkeypatch):
    monkeypatch.setattr("dsjax.serve.answering.KEEP_ALIVE_SECONDS", 0.02)
    site, engine = start()
    engine.gate.clear()
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    sent = talk(site, body, 4)
    assert sent[0]["type"] == "http.response.start" and sent[0]["status"] == 200
    assert sent[1]["body"] == b": keep-alive\n\n"
