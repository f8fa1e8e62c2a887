"""What Prometheus asks for."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Counters:
    """The counters of one service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._inspections = Counter(
            "flawmap_inspections", "Inspections that were committed.", ("model", "verdict"), registry=self._registry
        )
        self._seconds = Histogram(
            "flawmap_judging_seconds",
            "What it took to judge the batch that an image was in.",
            ("model",),
            buckets=_BOUNDS,
            registry=self._registry,
        )
        self._refused = Counter(
            "flawmap_refused_requests", "Requests that were refused, by status.", ("status",), registry=self._registry
        )
        self._waiting = Gauge("flawmap_waiting_images", "Images accepted and not answered.", registry=self._registry)

    def inspected(self, model: str, verdict: str, seconds: float) -> None:
        """Counts an inspection."""
        self._inspections.labels(model, verdict).inc()
        self._seconds.labels(model).observe(seconds)

    def refused(self, status: int) -> None:
        """Counts a request that was refused."""
        self._refused.labels(str(status)).inc()

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Asks for the length of the queue when it is told."""
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self._registry)
