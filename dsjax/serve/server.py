"""Starts the server, keeps it, and ends it: what tools/serve.py does.

The port opens at once. Once the weights are there requests are answered, and whenever there is none
the next program is compiled; /health says 503 until every program is. On SIGTERM or Ctrl-C new
requests get 503, running ones may end within `--grace` seconds, and what is left then is cut off; a
second signal cuts off at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import jax
import uvicorn
from jax.sharding import Mesh

from dsjax.checkpoint import fingerprint, load
from dsjax.checkpoint.load import Checkpoint
from dsjax.generate.balancing import Balancer
from dsjax.generate.engine import Engine
from dsjax.generate.page_files import PageFiles
from dsjax.generate.request import Request
from dsjax.infer.answers import default_sampling
from dsjax.infer.looking import Looking, look_by, open_format
from dsjax.infer.pictured import PicturedFormat
from dsjax.infer.score import Scorer
from dsjax.infer.weights import load_weights
from dsjax.model import redundant_experts
from dsjax.model.cache import check_split
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import two_meshes
from dsjax.serve.app import Access, Site
from dsjax.serve.metrics import Metrics
from dsjax.serve.replies import Limits
from dsjax.serve.scoring import PromptScorer
from dsjax.serve.service import Service
from dsjax.serve.worker import Worker
from dsjax.text.chat import find_format
from dsjax.text.vocabulary import open_vocabulary

LONGEST_CONTEXT = 8192  # unless the user sets one
KEY_VARIABLE = "DSJAX_API_KEY"
_HOSTS = "give 127.0.0.1 for this machine alone, or 0.0.0.0 for all addresses that it has"


def run(arguments: argparse.Namespace) -> int:
    """Runs tools/serve.py with its parsed arguments, until a signal; returns the exit code.

    Raises:
      ValueError: the checkpoint, its tokenizer or an argument cannot be used.
      OSError: the address cannot be listened at.
    """
    if arguments.context_cache and not arguments.prefix_tokens:
        raise ValueError("--context-cache keeps what --prefix-tokens does; give more than 0 tokens")
    name = arguments.model_name
    if name is not None and not (name.strip() and name.isprintable()):
        raise ValueError(
            f"--model-name {name!r} is no name that clients could give; without it they give the "
            "folder's name"
        )
    _check_host(arguments.host)
    access = _access(arguments)
    checkpoint = _shortened(load.open_checkpoint(arguments.checkpoint, dict(arguments.override)),
                            arguments.context)  # fmt: skip
    folder = checkpoint.tokenizer_folder
    vocabulary = open_vocabulary(folder, checkpoint.model.vocab_size)
    metrics = Metrics()
    service = Service(
        name=arguments.model_name or arguments.checkpoint.resolve().name,
        vocabulary=vocabulary,
        form=open_format(checkpoint) or find_format(folder, vocabulary),
        context=checkpoint.model.max_seq_len,
        vocab_size=checkpoint.model.vocab_size,
        defaults=default_sampling(folder),
        worker=Worker(
            max_batch=arguments.max_batch,
            max_waiting=arguments.max_waiting,
            observe=metrics.observe,
        ),
        metrics=metrics,
        limits=Limits(wait=arguments.max_wait, total=arguments.max_seconds),
    )
    # force: libraries that were imported may have set up handlers of their own.
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("jax", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    server = _Server(service, Site(service, access), checkpoint, arguments)
    try:
        return asyncio.run(server.serve())
    finally:
        metrics.close()


def _check_host(host: str) -> None:
    """Raises ValueError if a host is neither an address nor a name that has one."""
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter of a name that no host can have
        raise ValueError(f"--host {host!r} is no address, nor the name of one; {_HOSTS}") from error


def _access(arguments: argparse.Namespace) -> Access:
    keys = list(arguments.api_key or [])
    if os.environ.get(KEY_VARIABLE):
        keys.append(os.environ[KEY_VARIABLE])
    if not all(key.isascii() and key.isprintable() and key.strip() for key in keys):
        raise ValueError("an --api-key must be printable ASCII characters, at least one of them")
    loopback = _is_loopback(arguments.host)
    if not loopback and not keys:
        raise ValueError(
            f"--host {arguments.host} lets other machines in, so a key is needed: give --api-key "
            f"or set {KEY_VARIABLE}; or listen on 127.0.0.1"
        )
    return Access(
        keys=[Access.digest(key) for key in keys],
        loopback=loopback,
        max_body=arguments.max_body << 20,
        log_texts=arguments.log_texts,
    )


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _shortened(checkpoint: Checkpoint, context: int | None) -> Checkpoint:
    """Returns the checkpoint with the context that is served.

    Raises:
      ValueError: the model has not as much.
    """
    longest = checkpoint.model.max_seq_len
    if context is not None and not 2 <= context <= longest:
        raise ValueError(
            f"--context {context} is not between 2 and the model's {longest} (model.max_seq_len)"
        )
    served = min(longest, LONGEST_CONTEXT) if context is None else context
    model = dataclasses.replace(checkpoint.model, max_seq_len=served)
    return dataclasses.replace(checkpoint, model=model)


def _remedy(refused: BaseException | None) -> str:
    """Returns what helps where the system has refused to listen at an address."""
    number = getattr(refused, "errno", None)
    if number == errno.EADDRINUSE:
        return "another program uses the port: give another --port"
    if number == errno.EACCES:
        return "this port is for the administrator: give a --port from 1024 on"
    return f"--host is no address of this machine: {_HOSTS}"


class _Http(uvicorn.Server):
    """uvicorn's server without its signal handlers: this module has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server:
    """The server while it runs."""

    def __init__(
        self, service: Service, site: Site, checkpoint: Checkpoint, arguments: argparse.Namespace
    ) -> None:
        self._service, self._site, self._checkpoint = service, site, checkpoint
        self._arguments = arguments
        self._signal = 0
        self._failure: Exception | None = None
        self._files: PageFiles | None = None
        self._asked = asyncio.Event()
        self._hurry = asyncio.Event()

    async def serve(self) -> int:
        config = uvicorn.Config(
            self._site,
            host=self._arguments.host,
            port=self._arguments.port,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            http="h11",  # refuses what parsers may read in two ways
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._note, number)
        http = _Http(config)
        serving = asyncio.create_task(self._listen(http))
        try:
            while not http.started and not serving.done():
                await asyncio.sleep(0.01)
            if serving.done():
                serving.result()
                raise OSError(f"cannot listen at {self._arguments.host}:{self._arguments.port}")
            warm = asyncio.Event()
            await self._unless_asked(
                asyncio.to_thread(self._load, lambda: loop.call_soon_threadsafe(warm.set))
            )
            self._site.state = "warming"
            address = "http://{}:{}".format(*self._address(http))
            self._say(f"answering at {address}")
            if self._arguments.open:
                webbrowser.open(address)
            await self._unless_asked(warm.wait())
            if self._failure:
                raise self._failure
            self._site.state = "ready"
            print(f"ready {address}", flush=True)
            await self._asked.wait()
            await self._drain()
        finally:
            self._site.state = "draining"
            http.should_exit = True
            await asyncio.to_thread(self._service.worker.stop)
            if self._files is not None:
                await asyncio.to_thread(self._files.close)
            await asyncio.wait({serving})
        return 128 + self._signal

    async def _listen(self, http: _Http) -> None:
        try:
            await http.serve()
        except SystemExit as error:  # uvicorn's way to pass on what the system said
            host, port = self._arguments.host, self._arguments.port
            raise OSError(
                f"cannot listen at {host}:{port}; {_remedy(error.__context__)}"
            ) from error

    def _address(self, http: _Http) -> tuple[str, int]:
        port = http.servers[0].sockets[0].getsockname()[1]
        host = self._arguments.host
        return (f"[{host}]" if ":" in host else host), port

    def _note(self, number: int) -> None:
        if self._signal:
            self._hurry.set()
        self._signal = self._signal or number
        self._asked.set()

    async def _unless_asked(self, starting: Coroutine[Any, Any, object]) -> None:
        """Waits for a part of the start; a signal ends the process, once what runs has ended."""
        part = asyncio.ensure_future(starting)
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait({part, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self._signal:
            await self._drain()
            # A compilation cannot be interrupted, and nothing is to be saved.
            print("stopped while starting", file=sys.stderr, flush=True)
            os._exit(128 + self._signal)
        await part

    def _load(self, warm: Callable[[], object]) -> None:
        """Loads the weights and begins to serve.

        Args:
          warm: called when everything is compiled.
        """
        arguments, service = self._arguments, self._service
        mesh, prompt_mesh = two_meshes(arguments.mesh, arguments.prefill_mesh)
        for each in (mesh, prompt_mesh):
            check_split(self._checkpoint.model, each)
        redundant = self._redundant(mesh)
        self._say("loading the weights")
        model = load_weights(self._checkpoint, mesh, arguments.dtype)
        prompt_model = None
        if prompt_mesh:
            self._say("loading the weights again, for the prompts")
            prompt_model = load_weights(self._checkpoint, prompt_mesh, arguments.dtype)
        page_files = self._open_files(model)  # whose weights are those of any placement of experts
        balancer = None
        if redundant and mesh:
            every = arguments.eplb_every
            balancer = Balancer(model, mesh, n_redundant=redundant, every=every)
        engine = Engine(
            model,
            speculative=arguments.speculative,
            prefill_chunk=arguments.prefill_chunk,
            max_batch=arguments.max_batch,
            prefix_tokens=arguments.prefix_tokens,
            examples=service.examples(),
            balancer=balancer,
            page_files=page_files,
            prompt_model=prompt_model,
        )
        assert engine.shapes is not None
        scores = Scorer(prompt_model, prompt_mesh) if prompt_model else Scorer(model, mesh)
        scorer = PromptScorer(scores, engine.shapes.lengths[-1])
        service.scorer = scorer
        if isinstance(service.form, PicturedFormat):
            eyes_mesh = prompt_mesh or mesh
            service.looking = look_by(service.form, self._checkpoint, eyes_mesh, arguments.dtype)
        service.worker.start(engine, self._warming(engine, scorer, service.looking, warm))

    def _redundant(self, mesh: Mesh | None) -> int:
        """Returns how many redundant experts there are per layer.

        Raises:
          ValueError: the model or the mesh cannot have them.
        """
        count = self._arguments.redundant_experts
        if count:
            n_ranks = mesh.shape["expert"] if mesh else 1
            redundant_experts.check(self._checkpoint.model, count, n_ranks)
        return count

    def _open_files(self, model: Transformer) -> PageFiles | None:
        """Opens the context cache on disk, if one is wanted."""
        if self._arguments.context_cache is None:
            return None
        self._say("taking the fingerprint of the weights")
        named = {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(model)
        }
        self._files = PageFiles(
            self._arguments.context_cache,
            n_bytes=self._arguments.context_cache_gb * 10**9,
            fingerprint=f"{model.config} {fingerprint.inspect(named).fingerprints}",
        )
        return self._files

    def _warming(
        self,
        engine: Engine,
        scorer: PromptScorer,
        looking: Looking | None,
        warm: Callable[[], object],
    ) -> Iterator[None]:
        """Compiles one program after the other; runs in the worker's thread, between requests."""
        try:
            if self._arguments.warm:
                for done, total in engine.warm():
                    self._show(done, total)
                    yield
                yield from scorer.warm()
                if looking is not None:
                    yield from looking.warm()
                engine.add(Request((0,), 1))  # what else runs for the first time
                while engine.busy:
                    engine.step()
        except Exception as error:
            self._failure = error
        warm()

    def _show(self, done: int, total: int) -> None:
        self._say(f"compiling: {done} of {total} programs", quiet=bool(done * 10 // total == (
            done - 1) * 10 // total and done))  # fmt: skip

    def _say(self, text: str, *, quiet: bool = False) -> None:
        self._site.progress = text
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    async def _drain(self) -> None:
        """Waits for running requests, for as long as they may take."""
        self._site.state = "draining"
        worker = self._service.worker

        async def idle() -> None:
            while worker.n_running or worker.n_waiting:
                await asyncio.sleep(0.05)

        waits = {asyncio.create_task(idle()), asyncio.create_task(self._hurry.wait())}
        _, pending = await asyncio.wait(
            waits, timeout=self._arguments.grace, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
