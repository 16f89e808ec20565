"""tools/serve.py as a user runs it, and the clients that people have."""

import argparse
import asyncio
import concurrent.futures
import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
import uvicorn

from dsjax.serve import server
from tests import soak_serve
from tests.bench import bench_serve
from tests.checkpoint import hf_files
from tests.golden.cases import V3, Case
from tests.serve import serving
from tests.serve.formats import V3_1, VOCAB_SIZE, write_tokenizer
from tests.serve.test_picture_parts import part, png, text
from tests.serve.test_tools import tool
from tests.vision import toy

ROOT = serving.ROOT
HELLO = [{"role": "user", "content": "Some text"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return serving.write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny-chat")


@pytest.fixture(scope="module")
def url(checkpoint):
    with serving.serve(checkpoint) as (url, _):
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def compilations(url):
    text = httpx.get(f"{url}/metrics").text
    return float(re.search(r"^dsjax_compilations_total (\S+)", text, re.M)[1])


@pytest.mark.heavy
def test_openai_completes_and_chats(client):
    assert next(iter(client.models.list())).id == "tiny-chat"
    text = client.completions.create(model="tiny-chat", prompt="Some", max_tokens=9, temperature=0)
    again = client.completions.create(model="tiny-chat", prompt="Some", max_tokens=9, temperature=0)
    assert text.choices[0].text == again.choices[0].text and text.usage.completion_tokens <= 9
    chat = client.chat.completions.create(
        model="deepseek-chat", messages=HELLO, max_tokens=7, seed=3, n=2, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    assert [choice.index for choice in chat.choices] == [0, 1]
    content = chat.choices[0].logprobs.content
    assert content and all(len(each.top_logprobs) == 2 for each in content)
    assert chat.usage.prompt_cache_miss_tokens + chat.usage.prompt_cache_hit_tokens > 0
    thought = client.chat.completions.create(
        model="deepseek-reasoner", messages=HELLO, max_tokens=20, seed=3
    )
    assert thought.choices[0].message.reasoning_content
    assert thought.usage.completion_tokens_details.reasoning_tokens > 0


@pytest.mark.heavy
def test_openai_streams_what_it_gets_whole(client):
    asked = {"model": "deepseek-chat", "messages": HELLO, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.heavy
def test_context_cache_outlives_the_server(checkpoint, tmp_path):
    body = {"prompt": "Some text to begin with. " * 12, "max_tokens": 8, "temperature": 0}
    replies = []
    for _ in range(2):
        with serving.serve(checkpoint, "--context-cache", tmp_path, "--no-warm") as (url, _):
            replies.append(httpx.post(f"{url}/v1/completions", json=body, timeout=300).json())
    first, second = (reply["usage"] for reply in replies)
    assert first["prompt_cache_hit_tokens"] == 0
    assert second["prompt_cache_hit_tokens"] == (second["prompt_tokens"] - 1) // 64 * 64 > 0
    assert replies[0]["choices"][0]["text"] == replies[1]["choices"][0]["text"]


@pytest.mark.heavy
def test_openai_gets_json_and_calls(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        reply = client.chat.completions.create(
            model="deepseek-chat", messages=HELLO, seed=seed, response_format=form
        )
        if reply.choices[0].finish_reason == "stop":
            value = json.loads(reply.choices[0].message.content)
            assert value.keys() == {"a", "b"} and value["b"] in ("x", "y")
    with client.chat.completions.stream(
        model="deepseek-chat", messages=HELLO, tools=[tool()], tool_choice="required", seed=1
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


@pytest.mark.heavy
def test_openai_raises_the_errors_it_knows(client):
    with pytest.raises(openai.UnprocessableEntityError, match="temperature must be a number"):
        client.chat.completions.create(model="deepseek-chat", messages=HELLO, temperature=9)
    with pytest.raises(openai.NotFoundError, match="this server has tiny-chat"):
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="the model's context has 512"):
        client.completions.create(model="tiny-chat", prompt="x" * 5000)


@pytest.mark.heavy
def test_company_changes_nothing_and_compiles_nothing(url):
    before = compilations(url)

    async def ask(client, number):
        asked = {"model": "tiny-chat", "prompt": f"{number} Some text" * (number % 7 + 1)}
        if number % 3 == 1:
            asked |= {"logprobs": 2}
        asked |= {"max_tokens": 3 + number % 11, "temperature": 0}
        stream = await client.completions.create(**asked, stream=True)
        chunks = [chunk async for chunk in stream]
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    async def run():
        base = f"{url}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="x", timeout=120) as client:
            together = await asyncio.gather(*(ask(client, number) for number in range(24)))
            alone = [await ask(client, number) for number in range(0, 24, 4)]
        return together, alone

    together, alone = asyncio.run(run())
    assert together[::4] == alone
    assert compilations(url) == before


@pytest.mark.heavy
def test_load_loses_and_mixes_up_nothing(url):
    async def run():
        async with bench_serve.client(url, "none") as http:
            return await bench_serve.load(http, "tiny-chat", requests=60, clients=12)

    before = compilations(url)
    found = asyncio.run(run())
    assert found["requests"] == 60 == found["answered"] + found["left"]
    assert found["left"] and not found["lost"] and not found["mixed_up"]
    assert compilations(url) == before
    assert {"running": 0, "waiting": 0}.items() <= httpx.get(f"{url}/health").json().items()


@pytest.mark.heavy
def test_soak_of_a_few_seconds_finds_nothing():
    assert soak_serve.run(minutes=0.2, clients=6) == []


JAVASCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Some text" }];
const asked = { model: "deepseek-chat", messages, max_tokens: 30, temperature: 0 };
const found = { models: (await client.models.list()).data.map((model) => model.id) };
const whole = await client.chat.completions.create(asked);
found.whole = whole.choices[0].message.content;
found.tokens = whole.usage.completion_tokens;
found.streamed = "";
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...asked, ...options })) {
  found.streamed += chunk.choices[0]?.delta.content ?? "";
  found.usage = chunk.usage?.completion_tokens;
}
const thinks = await client.chat.completions.create({ ...asked, model: "deepseek-reasoner" });
found.thought = thinks.choices[0].message.reasoning_content;
const tools = JSON.parse(process.argv[3]);
const calls = client.chat.completions.stream(
  { model: "deepseek-chat", messages, tools, tool_choice: "required", seed: 1 });
found.call = (await calls.finalChatCompletion()).choices[0].message.tool_calls[0].function;
const text = await client.completions.create(
  { model: "tiny-chat", prompt: "Some", max_tokens: 5, temperature: 0, logprobs: 2 });
found.logprobs = text.choices[0].logprobs.tokens.length;
try {
  await client.chat.completions.create({ ...asked, temperature: 9 });
} catch (error) {
  found.error = [error.constructor.name, error.status, error.param];
}
const controller = new AbortController();
for await (const chunk of await client.chat.completions.create(
  { ...asked, max_tokens: 400, stream: true }, { signal: controller.signal })) controller.abort();
console.log(JSON.stringify(found));
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="needs node and npm")
def test_openai_of_javascript(url, tmp_path):
    install = ["npm", "install", "--prefix", str(tmp_path), "--no-audit", "--no-fund", "openai@6"]
    if subprocess.run(install, capture_output=True, cwd=tmp_path).returncode:
        pytest.skip("npm cannot install openai")
    (tmp_path / "client.mjs").write_text(JAVASCRIPT)
    command = ["node", str(tmp_path / "client.mjs"), url, json.dumps([tool()])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == ["tiny-chat", "deepseek-chat", "deepseek-reasoner"]
    assert found["streamed"] == found["whole"] and found["usage"] == found["tokens"] > 0
    assert found["thought"] and 0 < found["logprobs"] <= 5
    assert found["call"]["name"] == "get_weather"
    assert json.loads(found["call"]["arguments"])["city"] in ("Rome", "Oslo")
    assert found["error"] == ["UnprocessableEntityError", 422, "temperature"]
    until(lambda: not httpx.get(f"{url}/health").json()["running"])


@pytest.mark.heavy
def test_curl_lines_of_the_documentation_work(url):
    text = (ROOT / "docs/serving.md").read_text()
    blocks = re.findall(r"^```\n(curl .*?)```$", text, re.M | re.S)
    lines = [
        f"curl {line}" for block in blocks for line in re.split(r"^curl ", block, flags=re.M)[1:]
    ]
    assert len(lines) >= 7
    for line in lines:
        command = shlex.split(line.replace("http://127.0.0.1:8000", url))
        done = subprocess.run([*command, "--silent", "--fail-with-body"], capture_output=True)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert done.stdout


@pytest.mark.heavy
def test_server_drains_on_sigterm(checkpoint):
    with serving.serve(checkpoint, "--api-key", "k", "--no-warm") as (url, process):
        key = {"Authorization": "Bearer k"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        body = {"prompt": "Some", "max_tokens": 200, "logit_bias": {"1": -100}}
        with concurrent.futures.ThreadPoolExecutor() as threads:
            asked = threads.submit(
                httpx.post, f"{url}/v1/completions", json=body, headers=key, timeout=120
            )
            until(lambda: httpx.get(f"{url}/health").json()["running"])
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/health").json()["status"] == "draining")
            late = httpx.post(f"{url}/v1/completions", json=body, headers=key)
            assert late.status_code == 503 and late.json()["error"]["type"]
            response = asked.result()
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 200
        process.wait(timeout=60)
        errors = process.read_log()
        assert process.returncode == 143 and "Traceback" not in errors
        assert '"completion_tokens": 200' in errors


@pytest.mark.heavy
def test_mesh_changes_nothing(checkpoint, url):
    body = {"prompt": "Some text", "max_tokens": 20, "temperature": 0}
    wanted = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
    with serving.serve(checkpoint, "--no-warm", "--mesh", "tensor=2") as (other, _):
        found = httpx.post(f"{other}/v1/completions", json=body, timeout=300).json()
    assert found["choices"] == wanted["choices"]


@pytest.mark.heavy
def test_prompts_on_devices_of_their_own_change_nothing(checkpoint, url):
    """Of either kind of request; a page of a prompt that was asked before is known."""
    body = {"prompt": "Some text" * 60, "max_tokens": 20, "temperature": 0, "logprobs": 1}
    asked = [body, body | {"echo": True}]
    wanted = [httpx.post(f"{url}/v1/completions", json=each, timeout=120).json() for each in asked]
    meshes = ("--mesh", "tensor=2", "--prefill-mesh", "context=2,data=-1")
    with serving.serve(checkpoint, "--no-warm", *meshes) as (other, _):
        found = [
            httpx.post(f"{other}/v1/completions", json=each, timeout=300).json()
            for each in (*asked, body)
        ]
    texts = [[choice["text"] for choice in each["choices"]] for each in (*wanted, *found)]
    assert texts[:2] == texts[2:4] and texts[4] == texts[0]
    assert found[2]["usage"]["prompt_cache_hit_tokens"] > 0


@pytest.mark.heavy
def test_redundant_experts_change_nothing(tmp_path):
    """Nor what the other server has kept on disk of a prompt."""
    few = {"num_hidden_layers": 2, "max_position_embeddings": 512, "rope_scaling": None}
    config = V3 | few | {"vocab_size": VOCAB_SIZE}
    tensors = hf_files.plain(Case(config, seed=5))
    # Every token chooses these, of which one device holds all until experts move.
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][[4, 6, 8, 10, 12, 14]] += 10
    folder = write_tokenizer(hf_files.write(tmp_path, config, tensors), V3_1)
    found, known = [], []
    cache = ("--context-cache", tmp_path / "cache")
    for more in ((), ("--mesh", "expert=2", "--redundant-experts", "2", "--eplb-every", "1")):
        with serving.serve(folder, "--no-warm", *cache, *more) as (url, process):
            for prompt in ("Some text", "0123 " * 30):  # before and after the move
                body = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
                reply = httpx.post(f"{url}/v1/completions", json=body, timeout=300).json()
                found.append(reply["choices"])
                known.append(reply["usage"]["prompt_cache_hit_tokens"])
            metrics = httpx.get(f"{url}/metrics").text
            log = process.read_log()
    assert known == [0, 0, 0, 128]
    assert found[:2] == found[2:]
    assert 'dsjax_expert_imbalance{experts="before"}' in metrics
    assert "1 of 1 layers: the heaviest device has 1.00 times the mean load, before 2.00" in log


@pytest.mark.heavy
def test_pictures_are_seen_as_generate_sees_them(tmp_path):
    """With every program compiled before the first request."""
    folder, picture = toy.write(tmp_path / "janus"), tmp_path / "a.png"
    picture.write_bytes(png(0))
    seen = {"role": "user", "content": [part(png(0)), text("What is this?")]}
    greedy = ("--temperature", "0", "--max-new-tokens", "12", "--dtype", "float32")
    shown = run(
        folder, "--image", picture, "--prompt", "What is this?", *greedy, tool="generate"
    ).stdout  # fmt: skip
    with (
        serving.serve(folder) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        before = compilations(url)
        reply = client.chat.completions.create(
            model="janus", messages=[seen], temperature=0, max_tokens=12
        )
        assert compilations(url) == before
    assert reply.choices[0].message.content == shown.removesuffix("\n")


def until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def run(*arguments, tool="serve"):
    return subprocess.run(
        [sys.executable, f"tools/{tool}.py", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.heavy
def test_what_cannot_be_served_is_told_before_the_weights_are_read(checkpoint, tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    done = run(checkpoint, "--host", "0.0.0.0")
    assert done.returncode == 1 and "a key is needed" in done.stderr
    done = run(checkpoint, "--context", "999")
    assert done.returncode == 1 and "is not between 2 and the model's 512" in done.stderr
    done = run(checkpoint, "--redundant-experts", "2", "--port", "0")
    assert done.returncode == 1 and "this one is dense" in done.stderr
    done = run(checkpoint, "--mesh", "tensor=2", "--prefill-mesh", "data=999", "--port", "0")
    assert done.returncode == 1 and "need 1001 devices that they do not share" in done.stderr
    assert run(checkpoint, "--max-batch", "0").returncode == 2
    for name in ("", " ", "a\nb"):
        done = run(checkpoint, "--model-name", name)
        assert done.returncode == 1 and f"--model-name {name!r} is no name" in done.stderr
    done = run(checkpoint, "--host", "no host", "--api-key", "k")
    assert done.returncode == 1 and "--host 'no host' is no address" in done.stderr


@pytest.mark.parametrize("host", ["", "a..b", "no host", "::1::"])
def test_host_is_an_address_or_has_one(host):
    with pytest.raises(ValueError, match=r"is no address, .*give 127\.0\.0\.1 for this machine"):
        server._check_host(host)
    for good in ("127.0.0.1", "::1", "0.0.0.0", "localhost"):
        server._check_host(good)


async def listen(host, port):
    its = server._Server(None, None, None, argparse.Namespace(host=host, port=port))
    await its._listen(server._Http(uvicorn.Config(its, host=host, port=port, lifespan="off")))


def test_what_keeps_a_server_from_listening_decides_the_remedy():
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(OSError, match="another program uses the port: give another --port"):
            asyncio.run(listen("127.0.0.1", other.getsockname()[1]))
    with pytest.raises(OSError, match="--host is no address of this machine: give 127"):
        asyncio.run(listen("192.0.2.1", 0))  # reserved for documentation: no machine has it
    assert "from 1024 on" in server._remedy(PermissionError(errno.EACCES, "denied"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.0.0.9", True),
     ("0.0.0.0", False), ("::", False), ("my.example", False)],
)  # fmt: skip
def test_only_this_machine_is_let_in_without_a_key(host, loopback, monkeypatch):
    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    arguments = argparse.Namespace(host=host, api_key=None, max_body=1, log_texts=False)
    if loopback:
        assert server._access(arguments).loopback and server._access(arguments).keys == []
    else:
        with pytest.raises(ValueError, match="so a key is needed"):
            server._access(arguments)
    monkeypatch.setenv(server.KEY_VARIABLE, "secret")
    arguments.api_key = ["other"]
    access = server._access(arguments)
    assert access.loopback == loopback and len(access.keys) == 2
    arguments.api_key = [""]
    with pytest.raises(ValueError, match="printable ASCII"):
        server._access(arguments)
