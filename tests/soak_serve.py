"""A soak of the server: clients that read, leave, break off, dawdle, and send rubbish.

  python -m tests.soak_serve --minutes 20

Every few seconds each of the clients picks one of these at random. Whatever they do, an honest
greedy request must get the same text as in the beginning, every fault must be answered with a
status and a body in OpenAI's shape, the log may hold no traceback, nothing may be compiled, nothing
may be left running at the end, and the server's memory in the second half may not exceed that of
the first by more than a twentieth.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.bench.bench_serve import memory
from tests.serve.serving import serve, write_checkpoint
from tests.serve.test_any_body import ROUTES, SHARED

GROWTH = 1.05
PROMPTS = ["Some text", "with more", "[2] and", "x" * 60]
GOOD = {"prompt": "Some", "max_tokens": 8}


class Soak:
    """The clients and what they have seen."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.end = url, time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        self.wanted = {prompt: self._text(prompt) for prompt in PROMPTS}

    def _text(self, prompt: str) -> str:
        return self._honest(prompt).json()["choices"][0]["text"]

    def _honest(self, prompt: str) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        acts = [self.read, self.read, self.leave, self.reset, self.dawdle, self.rubbish, self.crowd]
        acts.append(self.mutate)
        while time.monotonic() < self.end:
            act = rng.choice(acts)
            try:
                act(rng)
                self.seen[act.__name__] += 1
            except Exception as error:
                self.faults.append(f"{act.__name__}: {type(error).__name__}: {error}")

    def read(self, rng: random.Random) -> None:
        prompt = rng.choice(PROMPTS)
        response = self._honest(prompt)
        if response.status_code == 429:
            time.sleep(0.5)
            return
        text = response.json()["choices"][0]["text"]
        assert text == self.wanted[prompt], f"{prompt!r} gave {text!r}"

    def leave(self, rng: random.Random) -> None:
        """Reads a little of a stream and closes it."""
        body = {"prompt": rng.choice(PROMPTS), "max_tokens": 150, "stream": True, "n": 2}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=120) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number > rng.randrange(1, 9):
                    return

    def _connect(self, body: bytes, length: int | None = None) -> socket.socket:
        where = urlsplit(self.url)
        connection = socket.create_connection((where.hostname, where.port), timeout=120)
        lines = ["POST /v1/completions HTTP/1.1", "Host: localhost"]
        lines += [f"Content-Length: {length or len(body)}", "", ""]
        connection.sendall("\r\n".join(lines).encode() + body)
        return connection

    def reset(self, rng: random.Random) -> None:
        """Breaks the connection off as a killed process does, before or in the answer."""
        body = json.dumps(
            {"prompt": "Some", "max_tokens": 150, "stream": rng.random() < 0.5}
        ).encode()
        connection = self._connect(body, len(body) + rng.choice([0, 50]))
        time.sleep(rng.random() * 0.3)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def dawdle(self, rng: random.Random) -> None:
        """Reads a stream byte by byte, and stops."""
        body = json.dumps({"prompt": "Some", "max_tokens": 100, "stream": True, "logprobs": 20})
        connection = self._connect(body.encode())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        for _ in range(rng.randrange(5, 30)):
            if not connection.recv(1):
                break
            time.sleep(0.05)
        connection.close()

    def rubbish(self, rng: random.Random) -> None:
        content = rng.randbytes(rng.randrange(400))
        self._refused(httpx.post(f"{self.url}/v1/chat/completions", content=content, timeout=120))

    def mutate(self, rng: random.Random) -> None:
        """Puts wrong values into a right body."""
        wrong = [None, -1, 1e9, "x", [], {}, [[]], True, "\x00", "\ud7ff" * 50, {"type": "x"}]
        path = rng.choice(list(ROUTES))
        chat = {"messages": [{"role": "user", "content": "Some"}]}
        body = {"max_tokens": 8} | ({"prompt": "Some"} if "prompt" in ROUTES[path] else chat)
        for name in rng.sample([*SHARED, *ROUTES[path], "zzz"], rng.randrange(1, 4)):
            body[name] = rng.choice(wrong)
        response = httpx.post(f"{self.url}{path}", json=body, timeout=120)
        if response.status_code != 200:
            self._refused(response)

    def _refused(self, response: httpx.Response) -> None:
        assert response.status_code in (400, 404, 422, 429), (response.status_code, response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    def crowd(self, rng: random.Random) -> None:
        """Asks for more at once than may wait."""
        body = GOOD | {"n": 32}
        statuses = [
            httpx.post(f"{self.url}/v1/completions", json=body, timeout=120).status_code
            for _ in range(2)
        ]
        assert set(statuses) <= {200, 429}, statuses


def run(minutes: float, clients: int) -> list[str]:
    """Returns what went wrong."""
    few = ("--port", "0", "--max-batch", "4", "--max-waiting", "40", "--prefill-chunk", "64",
           "--dtype", "float32")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "tiny-chat")
        with serve(checkpoint, few=few) as (url, process):
            soak = Soak(url, minutes * 60)
            compiled = _compilations(url)
            threads = [threading.Thread(target=soak.client, args=(n,)) for n in range(clients)]
            for thread in threads:
                thread.start()
            sizes = []
            while any(thread.is_alive() for thread in threads):
                time.sleep(5)
                sizes.append(memory(process.pid))
                health = httpx.get(f"{url}/health", timeout=60).json()
                print(f"{sizes[-1]:.0f} MB, {health}, {dict(soak.seen)}", flush=True)
            faults = soak.faults + _left(url)
            if _compilations(url) != compiled:
                faults.append("programs were compiled under load")
        half = len(sizes) // 2
        if half and max(sizes[half:]) > GROWTH * max(sizes[:half]):
            faults.append(f"memory grew: {[round(size) for size in sizes]}")
        if "Traceback" in process.read_log():
            faults.append(f"the log has a traceback: {process.read_log()[-3000:]}")
        if process.returncode != 143:
            faults.append(f"the exit code is {process.returncode}")
    return faults


def _compilations(url: str) -> str:
    text = httpx.get(f"{url}/metrics").text
    return next(line for line in text.splitlines() if line.startswith("dsjax_compilations_total"))


def _left(url: str) -> list[str]:
    """Waits until nothing runs."""
    end = time.monotonic() + 60
    health = {}
    while time.monotonic() < end:
        health = httpx.get(f"{url}/health").json()
        if not health["running"] and not health["waiting"]:
            return []
        time.sleep(0.2)
    return [f"requests are left: {health}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=12)
    arguments = parser.parse_args()
    faults = run(arguments.minutes, arguments.clients)
    for fault in faults[:20]:
        print(f"FAULT {fault}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
