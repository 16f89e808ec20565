"""Measures a server: streams beside each other, latencies under load, and other programs beside it.

  python -m tests.bench.bench_serve CKPT
  python -m tests.bench.bench_serve CKPT --streams 1 32 128 --requests 1000 --clients 128
  python -m tests.bench.bench_serve --url http://127.0.0.1:8000 --model NAME

Starts tools/serve.py for CKPT, or takes a server that runs. Prints one JSON object: the seconds
until everything is compiled; tokens per second of 1 and of more streams side by side, prompts
included; of `tools/generate.py` alone, for one stream; and if CKPT is a Hugging Face folder and
transformers is installed, of `transformers serve` for as many streams as there are at most, and of
transformers' `generate` for a batch of as many prompts. These are medians of five
rounds in which the sides take turns. Then, for many requests of a few clients with random lengths
of which some are cancelled or left, how many were answered, lost or mixed up, the p50 and p99 of
the time to the first token, and the memory of the server before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from tests.serve.serving import ROOT, serve

PROMPT = "It was the best of times, it was the worst of times, and it went on. " * 4
ROUNDS = 5


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


async def throughput(
    http: httpx.AsyncClient, model: str, streams: int, tokens: int
) -> tuple[float, float]:
    """Tokens per second of so many streams, each with a prompt of its own: in all, from the request
    to the last token; and of one of them, after its first token.
    """
    began = time.perf_counter()
    bodies = [
        {
            "model": model, "prompt": f"{PROMPT}{number}", "max_tokens": tokens, "seed": number,
            "temperature": 1.0,
        }
        for number in range(streams)
    ]  # fmt: skip
    replies = await asyncio.gather(*(stream(http, body) for body in bodies))
    assert all(reply["status"] == 200 for reply in replies), replies
    whole = sum(reply["tokens"] for reply in replies) / (time.perf_counter() - began)
    after = [(each["tokens"] - 1) / (each["seconds"] - each["first"]) for each in replies]
    return whole, median(after)


async def served(url: str, model: str, streams: int, tokens: int) -> float:
    """Tokens per second of another server, in all."""
    async with client(url, "none") as http:
        return (await throughput(http, model, streams, tokens))[0]


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


def transformers_speed(checkpoint: str, streams: int, tokens: int) -> Callable[[], float] | None:
    """Returns what measures tokens per second of transformers for a batch of the same prompts."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    except (ImportError, OSError, ValueError) as error:
        print(f"without transformers: {error}", file=sys.stderr)
        return None
    # One text for all: a batch of several lengths would be padded.
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]] * streams)

    def measure() -> float:
        began = time.perf_counter()
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip
        return (made.shape[1] - ids.shape[1]) * streams / (time.perf_counter() - began)

    return measure


@contextlib.contextmanager
def transformers_server(checkpoint: str) -> Iterator[str]:
    """Context of `transformers serve`; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", checkpoint, "--port",
               str(port), "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stderr=log) as process:
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    log.seek(0)
                    raise ValueError(log.read().decode()[-2000:])
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


async def measure(
    url: str,
    arguments: argparse.Namespace,
    pid: int | None,
    others: dict[str, Callable[[], float]],
) -> dict:
    """Measures a server, and other programs beside it while it idles."""
    async with client(url, arguments.key) as http:
        model = arguments.model or (await http.get("/v1/models")).json()["data"][0]["id"]
        for streams in arguments.streams:
            await throughput(http, model, streams, 8)
        rates: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for streams in arguments.streams:
                whole, after = await throughput(http, model, streams, arguments.tokens)
                rates.setdefault(f"{streams} streams", []).append(whole)
                rates.setdefault(f"each of {streams}, after its first", []).append(after)
            for name, run in others.items():
                rates.setdefault(name, []).append(await asyncio.to_thread(run))
        medians = {name: round(median(each), 1) for name, each in rates.items()}
        spans = {name: [round(min(each), 1), round(max(each), 1)] for name, each in rates.items()}
        result: dict = {"tokens_per_second": medians, "least_and_most": spans}
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
    versions = {}
    for name in ("jax", "transformers", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    result: dict = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result["versions"] = versions
    if arguments.url:
        result |= asyncio.run(measure(arguments.url, arguments, None, {}))
    else:
        most, tokens, checkpoint = max(arguments.streams), arguments.tokens, arguments.checkpoint
        others = {"generate": lambda: generate_speed(checkpoint, tokens, arguments.dtype)}
        few = ("--port", "0", "--dtype", arguments.dtype, "--max-batch", str(most))
        began = time.perf_counter()
        with contextlib.ExitStack() as open_servers:
            url, process = open_servers.enter_context(serve(checkpoint, few=few))
            result["start_seconds"] = round(time.perf_counter() - began, 1)
            if run := transformers_speed(checkpoint, most, tokens):
                others[f"transformers, batch {most}"] = run
                theirs = open_servers.enter_context(transformers_server(checkpoint))
                others[f"transformers serve, {most} streams"] = lambda: asyncio.run(
                    served(theirs, checkpoint, most, tokens)
                )
            result |= asyncio.run(measure(url, arguments, process.pid, others))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
