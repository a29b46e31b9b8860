"""The router's own metrics, made from the table in ``metrics.py``."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_dualpath import metrics
from vllm_dualpath.router.cluster import Cluster


class Telemetry:
    """Counts what happens; ``render`` adds what is."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._registry = CollectorRegistry()
        self.requests = self._counter(metrics.ROUTER_REQUESTS)
        self.attempts_failed = self._counter(metrics.ROUTER_ATTEMPTS_FAILED)
        self.planned_tokens = self._counter(metrics.ROUTER_PLANNED_TOKENS)
        self._rejected = self._counter(metrics.ROUTER_REJECTED_MESSAGES)
        self._queue = self._gauge(metrics.STORAGE_NIC_QUEUE_TOKENS)
        self._rate = self._gauge(metrics.STORAGE_NIC_RATE)
        self._waiting = self._gauge(metrics.ROUTER_WAITING)
        self.num_waiting: Callable[[], int] = lambda: 0
        """Asked when the metrics are."""
        self.decision_seconds = self._histogram(metrics.ROUTER_DECISION_SECONDS)
        self.wait_seconds = self._histogram(metrics.ROUTER_WAIT_SECONDS)
        for outcome in metrics.REQUEST_OUTCOMES:
            self.requests.labels(outcome)
        for role in metrics.READER_ROLES:
            self.planned_tokens.labels(role)
        self._num_rejected = 0

    def render(self) -> bytes:
        """The text of ``/metrics``."""
        self._waiting.set(self.num_waiting())
        self._queue.clear()
        self._rate.clear()
        for engine in self._cluster.engines:
            self._queue.labels(engine.engine_id).set(engine.read_queue_tokens)
            self._rate.labels(engine.engine_id).set(engine.read_rate.rate)
        self._rejected.inc(self._cluster.rejected_messages - self._num_rejected)
        self._num_rejected = self._cluster.rejected_messages
        return generate_latest(self._registry)

    def _counter(self, metric: metrics.Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self._registry)

    def _gauge(self, metric: metrics.Metric) -> Gauge:
        return Gauge(metric.name, metric.help, metric.labels, registry=self._registry)

    def _histogram(self, metric: metrics.Metric) -> Histogram:
        buckets = metric.buckets or Histogram.DEFAULT_BUCKETS
        return Histogram(metric.name, metric.help, buckets=buckets, registry=self._registry)
