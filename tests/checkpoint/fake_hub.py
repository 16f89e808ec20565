"""A Hub on this machine: one repository to download from, and one to push to.

It speaks as much of the Hub's protocol as huggingface_hub needs for small files; names below
`refused` are refused as the Hub refuses, with a status and an X-Error-Code.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

COMMIT = "a" * 40
REFUSED = {
    "missing": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "other": (404, "RevisionNotFound"),
    "broken": (500, ""),
}


@dataclass
class Hub:
    """What the Hub has, and what was pushed.

    Attributes:
      address: for HF_ENDPOINT.
      files: of the repository `me/tiny`, by name.
      pushed: the lines of each commit.
    """

    address: str
    files: dict[str, bytes]
    created: list[dict[str, object]] = field(default_factory=list)
    pushed: list[list[dict[str, object]]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Hub]:
    """Context with a Hub that answers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}", files)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.asked.append(self.path)
        file = re.fullmatch(r"/me/tiny/resolve/\w+/(.+)", self.path)
        if self._is_refused():
            pass
        elif file:
            content = hub.files[file[1]]
            name = f'"{hashlib.sha1(content).hexdigest()}"'
            self._answer(content, 200, {"ETag": name, "X-Repo-Commit": COMMIT})
        elif "/revision/" in self.path:
            siblings = [{"rfilename": name} for name in hub.files]
            self._say({"id": "me/tiny", "sha": COMMIT, "siblings": siblings})
        elif "/tree/" in self.path:
            self._say(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                    for name, content in hub.files.items()
                ]
            )
        else:
            self._say({})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        said = self.rfile.read(int(self.headers["Content-Length"]))
        if self._is_refused():
            pass
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(said))
            self._say({"url": f"{hub.address}/me/made", "id": "me/made"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(said)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files
            ]
            self._say({"files": modes})
        else:
            hub.pushed.append([json.loads(line) for line in said.splitlines()])
            self._say({"commitUrl": f"{hub.address}/me/made/commit/{COMMIT}", "commitOid": COMMIT})

    def _is_refused(self) -> bool:
        found = re.search(r"/refused/(\w+)/", self.path)
        if found:
            status, code = REFUSED[found[1]]
            self._answer(b"{}", status, {"X-Error-Code": code})
        return bool(found)

    def _say(self, value: object) -> None:
        self._answer(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
