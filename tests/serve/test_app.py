"""Who may use the server, what is refused before a request is read, and the page."""

import asyncio
import contextlib
import json
import re

import pytest

from dsjax.serve.app import Access
from tests.serve.scripted import ask, client, make_service, make_site, running

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture
def start(folders):
    with contextlib.ExitStack() as stack:

        def start(**access):
            service = make_service(folders["V3.1"])
            stack.enter_context(running(service, lambda request: [5, 6]))
            return make_site(service, **access)

        yield start


def test_keys_let_in(start):
    site = start(keys=[Access.digest("first"), Access.digest("second")])
    for given in (None, "Bearer wrong", "Basic second", "Bearer", "second", "Bearer first x"):
        headers = {"Authorization": given} if given else {}
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")):
            response = ask(site, method, path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["type"] == "authentication_error"
    for key in ("first", "second"):
        headers = {"Authorization": f"Bearer {key}"}
        assert ask(site, "POST", CHAT, json=HELLO, headers=headers).status_code == 200
    assert ask(site, "GET", "/health").status_code == 200
    assert ask(site, "GET", "/").status_code == 200


def test_names_of_models_may_have_slashes(start):
    site = start()
    site._service.name = "deepseek-ai/tiny"
    for name in ("deepseek-ai/tiny", "deepseek-ai%2Ftiny"):
        assert ask(site, "GET", f"/v1/models/{name}").json()["id"] == "deepseek-ai/tiny"
    assert ask(site, "GET", "/v1/models/deepseek-ai/other").status_code == 404


def test_routes_are_the_same_below_each_base(start):
    site = start()
    for base in ("", "/v1", "/beta"):
        names = [model["id"] for model in ask(site, "GET", f"{base}/models").json()["data"]]
        assert names == ["tiny", "deepseek-chat", "deepseek-reasoner"]
        assert ask(site, "GET", f"{base}/models/tiny").json()["max_model_len"] == 100
        assert ask(site, "GET", f"{base}/models/other").status_code == 404
        assert ask(site, "POST", f"{base}/chat/completions", json=HELLO).status_code == 200
        body = {"prompt": "x", "max_tokens": 1}
        assert ask(site, "POST", f"{base}/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 400, "body is not JSON"),
        (b"{", 400, "body is not JSON"),
        (b"[" * 100_000, 400, "nests deeper than 64"),
        (b'{"a": 1, "a": 2}', 400, "the key 'a' twice"),
        (b'{"temperature": NaN}', 400, "which is not finite"),
        (b"\xff\xfe", 400, "not UTF-8"),
        (b'{"a": ' + b"9" * 10_000 + b"}", 400, "a number that cannot be read"),
        (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', 400, "half a surrogate pair"),
        (rb'{"\ud83d": 1}', 400, "half a surrogate pair"),
        (rb'{"\ud83d\ude00": 1}', 422, "messages is missing"),
        (b"[]", 422, "body must be an object, not a list"),
        (b" " * 2_000_000, 413, "the body has more than"),
    ],
)
def test_body_that_cannot_be_read_is_refused(start, content, status, message):
    response = ask(start(max_body=1 << 20), "POST", CHAT, content=content)
    assert response.status_code == status and message in response.json()["error"]["message"]


def test_other_paths_and_methods_are_answered_in_the_same_shape(start):
    site = start()
    for path in ("/v2", "/page/../app.py", "/..%2fapp.py", "/v1/chat", "/page.css/"):
        response = ask(site, "GET", path)
        assert response.status_code == 404 and "/v1/models" in response.json()["error"]["message"]
    response = ask(site, "GET", CHAT)
    assert response.status_code == 405 and "POST" in response.headers["allow"]


def test_pages_of_other_sites_are_refused(start):
    site = start()
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:81"},
        {"Origin": "http://["},
        {"Host": "evil.example"},
        {"Host": "["},
    ):
        response = ask(site, "POST", CHAT, json=HELLO, headers=headers)
        assert response.status_code == 403
    for headers in (
        {"Origin": "http://localhost"},
        {"Host": "127.0.0.1:8000"},
        {"Host": "[::1]:9"},
    ):
        assert ask(site, "POST", CHAT, json=HELLO, headers=headers).status_code == 200
    elsewhere = start(loopback=False, keys=[Access.digest("k")])
    headers = {"Host": "my.example", "Authorization": "Bearer k"}
    assert ask(elsewhere, "POST", CHAT, json=HELLO, headers=headers).status_code == 200


def test_server_that_is_not_ready_says_so(start):
    site = start()
    for state in ("starting", "draining"):
        site.state, site.progress = state, "compiling: 3 of 9 programs"
        response = ask(site, "POST", CHAT, json=HELLO)
        assert response.status_code == 503 and response.headers["retry-after"]
        health = ask(site, "GET", "/health")
        assert health.status_code == 503 and health.json()["status"] == state
        assert ("progress" in health.json()) == (state == "starting")
    site.state = "warming"
    assert ask(site, "POST", CHAT, json=HELLO).status_code == 200
    health = ask(site, "GET", "/health")
    assert health.status_code == 503 and health.json()["progress"] == site.progress
    site.state = "ready"
    health = ask(site, "GET", "/health").json()
    assert health["status"] == "ready" and health["model"] == "tiny" and health["chat"]
    assert (health["pictures"], health["max_body"]) == (0, 8 << 20)


def test_dead_worker_is_seen(start):
    site = start()
    site._service.worker.stop()
    assert ask(site, "GET", "/health").json()["status"] == "failed"


def test_metrics_count_what_was_served(start):
    site = start()
    for _ in range(2):
        ask(site, "POST", CHAT, json=HELLO)
    ask(site, "POST", CHAT, json={})
    text = ask(site, "GET", "/metrics").text
    assert f'dsjax_requests_total{{route="{CHAT}",status="200"}} 2.0' in text
    assert f'dsjax_requests_total{{route="{CHAT}",status="422"}} 1.0' in text
    assert "dsjax_generated_tokens_total 4.0" in text
    assert "dsjax_time_to_first_token_seconds_count 2.0" in text


def test_page_is_whole_and_strict(start):
    site = start()
    page = ask(site, "GET", "/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"\son\w+=|<script>|style=|https?://", page.text)
    for name in re.findall(r'(?:src|href)="([\w.]+)"', page.text):
        assert ask(site, "GET", f"/{name}").status_code == 200, name
    script = ask(site, "GET", "/page.js")
    assert script.headers["content-type"].startswith("text/javascript")
    for name in re.findall(r'from "\./([\w.]+)"', script.text):
        assert ask(site, "GET", f"/{name}").status_code == 200, name
    for path in ("/page.js", "/markdown.js", "/conversations.js", "/pictures.js"):
        text = ask(site, "GET", path).text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_log_has_a_line_for_each_request_and_no_text_unless_asked(start, caplog):
    caplog.set_level("INFO")
    body = HELLO | {"messages": [{"role": "user", "content": "private"}]}
    ask(start(), "POST", CHAT, json=body)
    line = logged(caplog)
    assert line["status"] == 200 and line["completion_tokens"] == 2 and line["finish"] == ["length"]
    assert line["path"] == CHAT and line["first_token_seconds"] >= 0
    assert "private" not in caplog.text
    ask(start(log_texts=True), "POST", CHAT, json=body | {"stream": True})
    line = logged(caplog)
    assert line["prompt"] == ["private"] and len(line["text"]) == 1


def logged(caplog):
    """The newest line of a request."""
    lines = [each.getMessage() for each in caplog.records if each.name == "dsjax.serve.access"]
    return json.loads(lines[-1])


def test_full_queue_is_429_with_a_time(folders):
    service = make_service(folders["V3.1"], max_batch=1, max_waiting=0)
    with running(service, lambda request: [5, 6]) as engine:
        engine.gate.clear()
        site = make_site(service)

        async def run():
            async with client(site) as http:
                first = [asyncio.create_task(http.post(CHAT, json=HELLO)) for _ in range(4)]
                while not any(task.done() for task in first):
                    await asyncio.sleep(0.005)
                engine.gate.set()
                return await asyncio.gather(*first)

        responses = asyncio.run(run())
    codes = sorted(response.status_code for response in responses)
    assert set(codes) == {200, 429} and codes.count(200) >= 1
    (full, *_) = [response for response in responses if response.status_code == 429]
    assert int(full.headers["retry-after"]) > 0
