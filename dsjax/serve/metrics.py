"""What Prometheus reads at /metrics."""

from __future__ import annotations

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dsjax.serve.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_COMPILED = "backend_compile_duration"


class Metrics:
    """The server's counters, gauges and histograms; seconds are wall-clock."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"dsjax_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"dsjax_{name}", what, registry=registry)

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(f"dsjax_{name}", what, registry=registry, buckets=_SECONDS)

        self.requests = counter("requests", "HTTP requests answered", "route", "status")
        self.aborted = counter("aborted", "choices whose client left before their end")
        self.prompt = counter("prompt_tokens", "tokens of prompts")
        self.cached = counter("cached_tokens", "of these, taken from the cache of prefixes")
        self.generated = counter("generated_tokens", "tokens drawn")
        self.compilations = counter("compilations", "programs compiled since start")
        self.running = gauge("requests_running", "choices that the engine runs")
        self.waiting = gauge("requests_waiting", "choices that wait for their turn")
        self.drafted = gauge("drafted_tokens", "tokens drafted by MTP modules")
        self.accepted = gauge("accepted_tokens", "of these, accepted")
        self.imbalance = Gauge(
            "dsjax_expert_imbalance",
            "load of the heaviest device of the experts, relative to the mean",
            ["experts"],
            registry=registry,
        )
        self.placements = gauge("expert_placements", "how often redundant experts have moved")
        self.first_token = histogram("time_to_first_token_seconds", "from request to first token")
        self.between = histogram("time_per_token_seconds", "per token after the first, per request")
        self.whole = histogram("request_seconds", "from request to the end of its answer")
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)

    def observe(self, worker: Worker) -> None:
        """Reads the worker's state; called after its steps."""
        self.running.set(worker.n_running)
        self.waiting.set(worker.n_waiting)
        if worker.engine is not None:
            self.drafted.set(worker.engine.statistics.drafted)
            self.accepted.set(worker.engine.statistics.accepted)
            if balance := worker.engine.balance:
                for name in ("plain", "before", "after"):
                    self.imbalance.labels(name).set(getattr(balance, name))
                self.placements.set(balance.placements)

    def text(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Stops counting compilations."""
        jax.monitoring.unregister_event_duration_listener(self._count_compilation)

    def _count_compilation(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event.endswith(_COMPILED):
            self.compilations.inc()
