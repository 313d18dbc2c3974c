"""Numbers for Prometheus, of one server."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from uniql_jax.server.worker import Worker

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters, and gauges that are read when asked for."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self.registry = CollectorRegistry()
        new = {"registry": self.registry, "namespace": "uniql"}
        self.requests = Counter("requests", "Calls by path and status", ["path", "status"], **new)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **new)
        self.cached_tokens = Counter("cached_prompt_tokens", "Tokens of prompts that were not read again", **new)
        self.generated_tokens = Counter("generated_tokens", "Tokens made", **new)
        self.tokens_at = Counter("rate_tokens", "Tokens made at each prune rate", ["rate"], **new)
        self.switches = Counter("rate_changes", "Changes of the prune rate", **new)
        self.cancelled = Counter("cancelled", "Calls whose client hung up", **new)
        self.first_token = Histogram("first_token_seconds", "Time to the first piece", buckets=SECONDS, **new)
        self.duration = Histogram("call_seconds", "Time of a whole call", buckets=SECONDS, **new)
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What the session is like now."""
        session = self._worker.session
        held, now = session.memory(), session.load_now()
        for name, text, value in (
            ("prune_rate", "Prune rate, or the fraction that a setting of nested bits leaves out", session.rate),
            ("plan_steps", "Steps taken of the joint plan of nested bits, 0 at a prune rate", session.size.steps or 0),
            ("size_bytes", "Bytes of the present size's weights as they are stored", session.size.bytes),
            ("weight_bytes", "Bytes of weights", held["weights"]),
            ("cache_bytes", "Bytes of caches", held["cache"]),
            ("rows", "Rows of the batch", session.shape.rows),
            ("active", "Rows at work", now["active"]),
            ("waiting", "Answers that wait for a row", now["waiting"]),
            ("tokens_per_second", "Tokens handed out a second, over the last ten", self._worker.tokens_per_second()),
        ):
            yield GaugeMetricFamily(f"uniql_{name}", text, value=float(value))
        rows = GaugeMetricFamily("uniql_rate_active", "Rows at work at each prune rate that runs", labels=["rate"])
        for rate, count in session.active_at().items():
            rows.add_metric([f"{rate:g}"], float(count))
        yield rows

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)
