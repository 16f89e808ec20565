"""Bytes that no client sends in good faith: requests within requests, paths that climb, and bodies
without an end."""

import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from dsjax.serve import app as app_module
from tests.serve.scripted import make_service, make_site, running

INNER = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b'{"prompt": "x", "max_tokens": 1}'


@pytest.fixture(scope="module")
def engine_and_port(folders):
    """A server with a real socket."""
    service = make_service(folders["V3.1"])
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(running(service, lambda request: [30] * 9))
        site = make_site(service, max_body=1 << 20)
        config = uvicorn.Config(
            site, port=0, http="h11", log_config=None, access_log=False, lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield engine, server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        thread.join()


def send(port, *parts):
    """What comes back on a connection until nothing more does."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        connection.settimeout(1.0)
        found = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while part := connection.recv(1 << 16):
                found += part
        return found


def post(*headers, body=BODY):
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: localhost", *headers, b"", body]
    return b"\r\n".join(lines)


def test_a_plain_request_is_served(engine_and_port):
    _, port = engine_and_port
    length = b"Content-Length: %d" % len(BODY)
    assert send(port, post(length, b"Connection: close")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Length: 32", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"content-length: 5"],
        [b"Content-Length: 32", b"Content-Length: 5"],
        [b"Content-Length: 32, 5"],
        [b"Content-Length: +32"],
        [b"Content-Length: -1"],
        [b"Transfer-Encoding: gzip, chunked"],
        [b"Transfer-Encoding: xchunked"],
        [b"Transfer-Encoding : chunked"],
        [b"Content-Length: 32", b"Host: other"],
        [b"Content-Length: 32", b"X-Long: " + b"x" * 100_000],
        [b"Content-Length: 32", b"X-Zero: \x00"],
        [b"Content-Length: 32", b"X-Bare: a\rContent-Length: 5"],
    ],
)
def test_no_request_is_smuggled_in_another(engine_and_port, headers):
    engine, port = engine_and_port
    served = len(engine.requests)
    body = BODY if b"Host: other" in headers else b"0\r\n\r\n"
    found = send(port, post(*headers, body=body + INNER))
    assert b"HTTP/1.1 200" not in found, found
    assert found.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")), found
    assert len(engine.requests) == served


@pytest.mark.parametrize(
    "path",
    [
        b"/page/../app.py", b"/../../../../etc/passwd", b"/..%2f..%2f..%2fetc%2fpasswd",
        b"/%2e%2e/%2e%2e/etc/passwd", b"//etc/passwd", b"/page.js/../app.py", b"/page.css%00.py",
        b"/v1/models/..%2f..%2fapp.py", b"/./page.js", b"/\\..\\app.py",
        b"http://elsewhere/app.py", b"*",
    ],
)  # fmt: skip
def test_paths_lead_nowhere_else(engine_and_port, path):
    _, port = engine_and_port
    end = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    found = send(port, b"GET " + path + end)
    assert found.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), found
    assert b"import" not in found and b"root:" not in found


def test_a_body_without_an_end_is_cut_off(engine_and_port, monkeypatch):
    _, port = engine_and_port
    part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    found = send(port, post(b"Transfer-Encoding: chunked", body=b""), *[part] * 40)
    assert found.startswith(b"HTTP/1.1 413") and b"the body has more than" in found
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.05)
    found = send(port, post(b"Content-Length: 500", body=b"{"))
    assert found.startswith(b"HTTP/1.1 400") and b"the body took longer than" in found


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00" * 9, b"\r\n" * 9, b"GET\r\n\r\n", b"x" * 99]
)
def test_what_is_no_request_breaks_nothing(engine_and_port, data):
    _, port = engine_and_port
    assert b"HTTP/1.1 200" not in send(port, data, b"\r\n\r\n")
    test_a_plain_request_is_served(engine_and_port)
