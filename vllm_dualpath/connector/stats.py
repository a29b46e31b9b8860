"""Counts what the connector and its mover did, and exports it through vLLM's ``/metrics``.

Between the sides and the front end the numbers travel as plain dictionaries in vLLM's own
statistics: increments, values of gauges, and observations of histograms since the last report.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter as PromCounter
from prometheus_client import Gauge as PromGauge
from prometheus_client import Histogram as PromHistogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from vllm_dualpath import metrics
from vllm_dualpath.messages import MoverStats
from vllm_dualpath.metrics import ENGINE_METRICS, Metric

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SEPARATOR = "|"
_PROM_TYPES = {"counter": PromCounter, "gauge": PromGauge, "histogram": PromHistogram}
_KINDS = ("counter", "gauge", "histogram")


def series(metric: Metric, label: str = "") -> str:
    """The key of one series: a metric and the value of its only label, if it has one."""
    return f"{metric.name}{_SEPARATOR}{label}"


class DualPathStats(KVConnectorStats):
    """What happened since the last report: ``{kind: {series: number or list of numbers}}``."""

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not any(self.data.get(kind) for kind in _KINDS)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for kind in _KINDS:
            mine = self.data.setdefault(kind, {})
            for key, value in other.data.get(kind, {}).items():
                mine[key] = value if kind == "gauge" else mine.get(key, type(value)()) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line: counters and gauges, and how many observations there were."""
        short: dict[str, int | float] = {}
        for kind in _KINDS:
            for key, value in self.data.get(kind, {}).items():
                name = key.removeprefix("vllm:dualpath_").rstrip(_SEPARATOR)
                short[name] = len(value) if isinstance(value, list) else value
        return short


class Recorder:
    """Gathers numbers of one side from any thread until vLLM asks for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._gauges: dict[str, float] = {}
        self._observations: dict[str, list[float]] = {}
        self._mover = MoverStats()

    def count(self, metric: Metric, amount: int = 1, label: str = "") -> None:
        """Add to a counter."""
        if amount:
            with self._lock:
                self._counters[series(metric, label)] += amount

    def observe(self, metric: Metric, values: list[float]) -> None:
        """Add observations to a histogram."""
        if values:
            with self._lock:
                self._observations.setdefault(series(metric), []).extend(values)

    def forget_mover(self) -> None:
        """A new mover counts from zero."""
        self._mover = MoverStats()

    def record_mover(self, stats: MoverStats) -> None:
        """Take over a mover's cumulative counters as increments. One thread."""
        last, self._mover = self._mover, stats
        for metric, label, now, before in (
            (metrics.STORAGE_READ_BYTES, "", stats.storage_read_bytes, last.storage_read_bytes),
            (metrics.DONATED_BYTES, "", stats.donated_bytes, last.donated_bytes),
            (metrics.STORAGE_WRITE_BYTES, "", stats.storage_write_bytes, last.storage_write_bytes),
            (
                metrics.PUSH_BYTES,
                "to_prefill",
                stats.push_to_prefill_bytes,
                last.push_to_prefill_bytes,
            ),
            (
                metrics.PUSH_BYTES,
                "to_decode",
                stats.push_to_decode_bytes,
                last.push_to_decode_bytes,
            ),
            (metrics.CORRUPT_BLOCKS, "", stats.corrupt_blocks, last.corrupt_blocks),
            (metrics.BLOCKS_NOT_STORED, "", stats.blocks_not_stored, last.blocks_not_stored),
        ):
            self.count(metric, max(0, now - before), label)
        for reason, total in stats.load_failures.items():
            self.count(
                metrics.LOAD_FAILURES, max(0, total - last.load_failures.get(reason, 0)), reason
            )
        self.observe(metrics.STAGE_SECONDS, list(stats.stage_seconds))
        with self._lock:
            for state in metrics.SLOT_STATES:
                value = float(getattr(stats, f"slots_{state}"))
                self._gauges[series(metrics.STAGING_SLOTS, state)] = value

    def take(self) -> DualPathStats | None:
        """Everything since the last call, or ``None``."""
        if self.is_empty:
            return None
        with self._lock:
            data: dict[str, Any] = {
                "counter": dict(self._counters),
                "gauge": self._gauges,
                "histogram": self._observations,
            }
            self._counters, self._gauges, self._observations = Counter(), {}, {}
        return DualPathStats(data)

    @property
    def is_empty(self) -> bool:
        """Whether ``take`` would return nothing."""
        return not (self._counters or self._gauges or self._observations)


class DualPathPromMetrics(KVConnectorPromMetrics):
    """The engine's rows of the metric table as Prometheus series, labelled by engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, tuple[Metric, Any]] = {}
        for metric in ENGINE_METRICS:
            options = {"buckets": metric.buckets} if metric.buckets else {}
            made = metric_types[_PROM_TYPES[metric.kind]](
                name=metric.name,
                documentation=metric.help,
                labelnames=[*labelnames, *metric.labels],
                **options,
            )
            self._metrics[metric.name] = (metric, made)
            if not metric.labels:  # shown as zero from the start
                for values in per_engine_labelvalues.values():
                    made.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for kind in _KINDS:
            for key, value in transfer_stats_data.get(kind, {}).items():
                name, _, label = key.partition(_SEPARATOR)
                metric, made = self._metrics[name]
                values = [
                    *self.per_engine_labelvalues[engine_idx],
                    *([label] if metric.labels else []),
                ]
                child = made.labels(*values)
                if kind == "counter":
                    child.inc(value)
                elif kind == "gauge":
                    child.set(value)
                else:
                    for observation in value:
                        child.observe(observation)
