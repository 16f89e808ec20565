"""Measures a server: streams beside each other, latencies under load, and generate beside it.

  python -m tests.bench.bench_serve CKPT
  python -m tests.bench.bench_serve CKPT --streams 1 32 128 --requests 1000 --clients 128
  python -m tests.bench.bench_serve --url http://127.0.0.1:8000 --model NAME

Starts tools/serve.py for CKPT, or takes a server that runs. Prints one JSON object: tokens per
second of 1 and of more greedy streams side by side (medians of three rounds, taken in turns); of
`tools/generate.py` alone, for one stream; and, for many requests of a few clients with random
lengths of which some are cancelled or left, how many were answered, lost or mixed up, the p50 and
p99 of the time to the first token, and the memory of the server before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import httpx

from tests.serve.serving import ROOT, serve

PROMPT = [5, 9, 14, 20, 27, 33, 41, 52] * 8


async def stream(client: httpx.AsyncClient, body: dict, *, leave: int | None = None) -> dict:
    """Asks once; returns the tokens' count, text and times. `leave`: goes after so many chunks."""
    began, first, text, usage, chunks, error = time.perf_counter(), None, "", None, 0, None
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            return {"status": response.status_code, "text": ""}
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            error = chunk.get("error", error)
            first = first or time.perf_counter() - began
            text += "".join(choice["text"] for choice in chunk.get("choices", ()))
            usage = chunk.get("usage") or usage
            chunks += 1
            if leave is not None and chunks >= leave:
                return {"status": "left", "text": text, "first": first}
    return {
        "status": 200 if usage and not error else "lost", "text": text, "first": first,
        "tokens": usage["completion_tokens"] if usage else 0,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def client(url: str, key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=headers)


async def throughput(http: httpx.AsyncClient, model: str, streams: int, tokens: int) -> float:
    """Tokens per second of so many equal streams, each with a prompt of its own."""
    began = time.perf_counter()
    bodies = [
        {
            "model": model, "prompt": [*PROMPT, 3 + number], "max_tokens": tokens, "seed": number,
            "temperature": 1.0,
        }
        for number in range(streams)
    ]  # fmt: skip
    replies = await asyncio.gather(*(stream(http, body) for body in bodies))
    assert all(reply["status"] == 200 for reply in replies), replies
    return sum(reply["tokens"] for reply in replies) / (time.perf_counter() - began)


async def load(http: httpx.AsyncClient, model: str, requests: int, clients: int) -> dict:
    """Many requests of a few clients; every complete greedy answer is checked against another."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 250) for _ in range(rng.randrange(1, 90))] for _ in range(24)]
    wanted = {}
    for number, prompt in enumerate(prompts):
        body = {"model": model, "prompt": prompt, "max_tokens": 40, "temperature": 0}
        wanted[number] = (await stream(http, body))["text"]
    jobs = list(range(requests))
    found: list[dict] = []

    async def work(own: random.Random) -> None:
        while jobs:
            jobs.pop()
            number, most = own.randrange(len(prompts)), own.randrange(1, 41)
            body = {"model": model, "prompt": prompts[number], "max_tokens": most, "temperature": 0}
            leave = own.randrange(1, 4) if own.random() < 0.2 else None
            reply = await stream(http, body, leave=leave)
            while reply["status"] == 429:
                await asyncio.sleep(0.2)
                reply = await stream(http, body, leave=leave)
            reply["mixed"] = not wanted[number].startswith(reply["text"])
            found.append(reply)

    began = time.perf_counter()
    await asyncio.gather(*(work(random.Random(number)) for number in range(clients)))
    first = sorted(reply["first"] for reply in found if reply.get("first"))
    return {
        "requests": len(found),
        "answered": sum(reply["status"] == 200 for reply in found),
        "left": sum(reply["status"] == "left" for reply in found),
        "lost": sum(reply["status"] not in (200, "left") for reply in found),
        "mixed_up": sum(reply["mixed"] for reply in found),
        "seconds": time.perf_counter() - began,
        "first_token_p50": first[len(first) // 2],
        "first_token_p99": first[int(len(first) * 0.99)],
    }


def memory(pid: int) -> float:
    """MB of a process, on Linux."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if status.is_file() else None
    return int(found[1]) / 1024 if found else 0.0


def generate_speed(checkpoint: str, tokens: int, dtype: str) -> float:
    """Tokens per second that tools/generate.py reports for one stream."""
    command = [sys.executable, "tools/generate.py", checkpoint, "--prompt", "x" * 200, "--raw",
               "--max-new-tokens", str(tokens), "--dtype", dtype]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    speeds = re.findall(r"\(([\d.]+)/s\)", done.stderr)
    return float(speeds[-1]) if speeds else 0.0


async def measure(url: str, arguments: argparse.Namespace, pid: int | None) -> dict:
    async with client(url, arguments.key) as http:
        model = arguments.model or (await http.get("/v1/models")).json()["data"][0]["id"]
        rates: dict[int, list[float]] = {streams: [] for streams in arguments.streams}
        for _ in range(3):
            for streams, own in rates.items():
                own.append(await throughput(http, model, streams, arguments.tokens))
        result: dict = {"tokens_per_second": {k: median(v) for k, v in rates.items()}}
        before = memory(pid) if pid else 0.0
        result["load"] = await load(http, model, arguments.requests, arguments.clients)
        if pid:
            result["memory_mb"] = {"before": before, "after": memory(pid)}
        metrics = (await http.get("/metrics")).text
        compiled = re.search(r"^dsjax_compilations_total (\S+)", metrics, re.M)
        result["compilations"] = float(compiled[1]) if compiled else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", nargs="?")
    add("--url", help="a server that runs already")
    add("--model", help="its name there")
    add("--key", default="none")
    add("--dtype", default="float32")
    add("--streams", type=int, nargs="+", default=[1, 16])
    add("--tokens", type=int, default=128, help="per stream")
    add("--requests", type=int, default=200)
    add("--clients", type=int, default=32)
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) == (arguments.url is None):
        parser.error("give CKPT or --url")
    result: dict = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if arguments.url:
        result |= asyncio.run(measure(arguments.url, arguments, None))
    else:
        few = ("--port", "0", "--dtype", arguments.dtype)
        few += ("--max-batch", str(max(arguments.streams)))
        with serve(arguments.checkpoint, few=few) as (url, process):
            result |= asyncio.run(measure(url, arguments, process.pid))
        speed = generate_speed(arguments.checkpoint, arguments.tokens, arguments.dtype)
        result["generate_tokens_per_second"] = speed
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
