"""The routes, who may use them, and what is refused before a request is read.

The page and /health are open; everything else needs a key, if the server has any. On loopback
without a key any web page that the user visits could talk to the server, so a request that a
browser sends from another site, or to another name of this machine, is refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dsjax import files
from dsjax.infer.pictured import PicturedFormat
from dsjax.serve.answering import ClientLeft
from dsjax.serve.chat import complete_chat
from dsjax.serve.completion import complete_text
from dsjax.serve.errors import ApiError
from dsjax.serve.picture_parts import MOST_PICTURES
from dsjax.serve.record import Entry
from dsjax.serve.service import Service

_logger = logging.getLogger(__name__)
BODY_SECONDS = 60.0
_BASES = ("", "/v1", "/beta")
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
    "/conversations.js": ("conversations.js", "text/javascript"),
    "/pictures.js": ("pictures.js", "text/javascript"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
Complete = Callable[..., Awaitable[Response]]


@dataclasses.dataclass
class Access:
    """Who may use the server, and for how much.

    Attributes:
      keys: SHA-256 of each key; (): no key is needed.
      loopback: whether the server listens on this machine alone.
    """

    keys: Sequence[bytes] = ()
    loopback: bool = True
    max_body: int = 8 << 20
    log_texts: bool = False

    @classmethod
    def digest(cls, key: str) -> bytes:
        return hashlib.sha256(key.encode()).digest()


class Site:
    """The server's routes.

    Attributes:
      state: "starting"; "warming", when requests are answered, but may wait for programs to be
        compiled; "ready"; "draining"; or "failed".
    """

    def __init__(self, service: Service, access: Access) -> None:
        self.state = "starting"
        self.progress = ""
        self._service, self._access = service, access
        self._page = {path: (_PAGE / name).read_bytes() for path, (name, _) in _PAGE_FILES.items()}
        routes = [Route(path, self._file, methods=["GET"]) for path in _PAGE_FILES]
        routes += [Route("/health", self._health, methods=["GET"])]
        routes += [Route("/metrics", self._guarded(self._metrics), methods=["GET"])]
        for base in _BASES:
            for path, complete in (("chat/completions", complete_chat),
                                   ("completions", complete_text)):  # fmt: skip
                handle = self._guarded(self._completing(complete))
                routes.append(Route(f"{base}/{path}", handle, methods=["POST"]))
            models = self._guarded(self._models)
            routes.append(Route(f"{base}/models", models, methods=["GET"]))
            routes.append(Route(f"{base}/models/{{name:path}}", models, methods=["GET"]))
        self._routes = Starlette(
            routes=routes, exception_handlers={HTTPException: _refused, ApiError: _failed}
        )
        self._routes.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, as ASGI has it."""
        names = {name.lower() for name, _ in scope.get("headers", ())}
        if {b"content-length", b"transfer-encoding"} <= names:
            # Request smuggling: a proxy that trusts the other header than we do sees other borders
            # between requests.
            error = ApiError(400, "Content-Length and Transfer-Encoding do not go together")
            await _Failure(error, {"Connection": "close"})(scope, receive, send)
            return
        await self._routes(scope, receive, send)

    def _guarded(
        self, handle: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Lets only those through who may use the server."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_site(request.headers)
                self._check_key(request.headers)
                return await handle(request)
            except ApiError as error:
                return _failed(request, error)

        return guarded

    def _completing(self, complete: Complete) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            address = request.client.host if request.client else ""
            entry = Entry(request.method, request.url.path, address, texts=self._access.log_texts)
            response = await self._answer(request, complete, entry, address)
            if not entry.streaming:
                entry.write(response.status_code, getattr(response, "why", ""))
            counted = self._service.metrics.requests.labels(request.url.path, response.status_code)
            counted.inc()
            return response

        return handle

    async def _answer(
        self, request: Request, complete: Complete, entry: Entry, address: str
    ) -> Response:
        try:
            if self.state not in ("warming", "ready"):
                raise ApiError(503, f"the server is {self.state}; try again", retry_after=5)
            values = await self._read(request)
            return await complete(request, values, self._service, entry, user=address)
        except ApiError as error:
            return _failed(request, error)
        except (ClientLeft, ClientDisconnect):
            return Response(status_code=499)
        except Exception:
            _logger.exception("a request failed")
            return _failed(request, ApiError(500, "the server failed; its log says how"))

    async def _read(self, request: Request) -> Any:
        most = self._access.max_body
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise ApiError(413, f"the body has more than {most:,} bytes")
        except TimeoutError:
            raise ApiError(400, f"the body took longer than {BODY_SECONDS:g} seconds") from None
        try:
            values = files.parse(bytes(data), "body")
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            # An escape alone can spell it. Neither a tokenizer nor an answer in UTF-8 can hold it.
            raise ApiError(
                400, "body has half a surrogate pair (\\ud800 to \\udfff), which is no character"
            ) from None
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        return values

    def _check_key(self, headers: Mapping[str, str]) -> None:
        if not self._access.keys:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = Access.digest(key.strip())
        # Compares with every key, so that time tells nothing.
        right = [hmac.compare_digest(digest, own) for own in self._access.keys]
        if scheme.lower() != "bearer" or not any(right):
            raise ApiError(
                401, "the key is missing or wrong; send it as `Authorization: Bearer KEY`"
            )

    def _check_site(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # brackets without an address in them
            name = host
        if self._access.loopback and name not in _LOOPBACK:
            raise ApiError(403, f"this server is not {files.shown(name)}; use localhost")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "a page of another site may not use this server")

    async def _file(self, request: Request) -> Response:
        path = request.url.path
        kind = _PAGE_FILES[path][1]
        return Response(self._page[path], media_type=kind, headers=_PAGE_HEADERS)

    async def _health(self, request: Request) -> Response:
        worker = self._service.worker
        serves = self.state in ("warming", "ready")
        state = "failed" if serves and not worker.alive else self.state
        body = {
            "status": state,
            "model": self._service.name,
            "chat": self._service.form is not None,
            # How many a request may have; 0: the model does not see.
            "pictures": MOST_PICTURES if isinstance(self._service.form, PicturedFormat) else 0,
            "max_body": self._access.max_body,
            "key": bool(self._access.keys),
            "running": worker.n_running,
            "waiting": worker.n_waiting,
        }
        if state in ("starting", "warming"):
            body["progress"] = self.progress
        return JSONResponse(body, status_code=200 if state == "ready" else 503)

    async def _metrics(self, request: Request) -> Response:
        self._service.metrics.observe(self._service.worker)
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        models = self._service.models()
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse(models)
        for model in models["data"]:
            if model["id"] == name:
                return JSONResponse(model)
        raise ApiError(404, f"there is no model {name[:100]!r}", code="model_not_found")


def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _Failure(error, headers)


def _refused(request: Request, error: Exception) -> Response:
    """Answers for a path or method that there is not."""
    assert isinstance(error, HTTPException)
    status = error.status_code if error.status_code in (404, 405) else 400
    paths = "see /v1/models, /v1/chat/completions, /v1/completions, /health and /metrics"
    return _Failure(ApiError(status, f"{error.detail}: {paths}"), dict(error.headers or {}))


class _Failure(JSONResponse):
    """A failure, and what the log says of it."""

    def __init__(self, error: ApiError, headers: Mapping[str, str]) -> None:
        super().__init__(error.body(), error.status, headers)
        self.why = error.message
