"""An engine that replies as scripted, a service around it, and a client of its routes."""

import asyncio
import contextlib
import json
import threading
import time

import httpx
import numpy as np
import uvicorn

from dsjax.generate.engine import Statistics
from dsjax.generate.record import Record
from dsjax.generate.request import Output
from dsjax.generate.sampling import Sampling
from dsjax.serve.app import Access, Site
from dsjax.serve.metrics import Metrics
from dsjax.serve.replies import Limits
from dsjax.serve.service import Service
from dsjax.serve.worker import Worker
from dsjax.text.chat import find_format
from dsjax.text.vocabulary import open_vocabulary
from tests.serve.formats import VOCAB_SIZE


class ScriptedEngine:
    """Replies with the tokens that `script` returns for a request, one per step and request.

    While `gate` is cleared, steps draw nothing. A script may return an exception, which the step
    raises.
    """

    def __init__(self, script):
        self.script, self.requests, self.open, self.cancelled = script, [], {}, []
        self.statistics = Statistics()
        self.balance = None
        self.gate = threading.Event()
        self.gate.set()

    @property
    def busy(self):
        return bool(self.open)

    def add(self, request):
        if len(request.prompt) == 13:
            raise ValueError("thirteen tokens")
        self.requests.append(request)
        self.open[len(self.requests)] = [request, self.script(request), 0]
        return len(self.requests)

    def cancel(self, id):
        self.cancelled.append(id)
        self.open.pop(id, None)

    def abandon(self):
        self.open.clear()

    def step(self):
        new = {}
        if not self.gate.wait(0.01):
            return new
        time.sleep(0.0005)  # lets the event loop have its turn, as a model does
        for id, state in list(self.open.items()):
            request, reply, done = state
            if isinstance(reply, Exception):
                raise reply
            if not request.max_new_tokens:
                new[id] = Output([], "length")
                del self.open[id]
                continue
            token = reply[done]
            state[2] = done = done + 1
            stopped = token in request.stop_ids
            over = stopped or done == min(len(reply), request.max_new_tokens)
            finish = ("stop" if stopped else "length") if over else None
            new[id] = Output([token], finish, report(request, token))
            if over:
                del self.open[id]
        return new


def report(request, token):
    """Log-probabilities in which the drawn token is the most likely one."""
    if not request.logprobs:
        return Record()
    ids = [token, *range(3, 3 + request.top_logprobs)][: request.top_logprobs]
    values = -0.5 - np.arange(request.top_logprobs, dtype=np.float32)
    drawn = np.float32([-0.5])
    return Record(drawn, drawn, top_ids=np.int32([ids]), top_logprobs=values[None])


def make_service(
    folder, *, form=None, max_batch=4, max_waiting=8, limits=None, scorer=None, context=100
):
    """A service of a tokenizer's folder; its worker is not started."""
    vocabulary = form.vocabulary if form else open_vocabulary(folder, VOCAB_SIZE)
    metrics = Metrics()
    return Service(
        name="tiny",
        vocabulary=vocabulary,
        form=form or find_format(folder, vocabulary),
        context=context,
        vocab_size=VOCAB_SIZE,
        defaults=Sampling(),
        worker=Worker(max_batch=max_batch, max_waiting=max_waiting),
        metrics=metrics,
        limits=limits or Limits(),
        scorer=scorer,
    )


@contextlib.contextmanager
def running(service, script):
    """Context in which a scripted engine serves; yields the engine."""
    engine = ScriptedEngine(script)
    service.worker.start(engine)
    try:
        yield engine
    finally:
        engine.gate.set()
        service.worker.stop()
        service.metrics.close()


def make_site(service, **access):
    site = Site(service, Access(**access))
    site.state = "ready"
    return site


def client(site, **options):
    """An asynchronous client of a site, without a network."""
    transport = httpx.ASGITransport(site)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **options)


@contextlib.contextmanager
def listening(site):
    """Context in which a site listens at a port; yields its address."""
    server = uvicorn.Server(uvicorn.Config(site, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(site, method, path, **options):
    """The response to one request."""

    async def run():
        async with client(site) as http:
            return await http.request(method, path, **options)

    return asyncio.run(run())


def post(site, path, **body):
    """The JSON object that answers one, which must succeed."""
    response = ask(site, "POST", path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(response):
    """The chunks of a stream."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
