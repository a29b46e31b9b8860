"""Every metric of the package in one table: name, type, labels, help.

The router exports its own; the connector exports the others through vLLM's ``/metrics``. This
module is data: it imports no metrics library and counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MetricKind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. Counters are exported with the suffix ``_total``, as Prometheus asks for."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] | None = None
    """Upper bounds of a histogram's buckets, in the unit of the name."""


_DECISION_BUCKETS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 0.1)
_STAGE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WAIT_BUCKETS = (1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.5, 1.0)

# --- router --------------------------------------------------------------------------------------

ROUTER_REQUESTS = Metric(
    "dualpath_router_requests",
    "counter",
    "Requests by outcome: transferred, short, alone, rejected, cancelled or failed.",
    ("outcome",),
)
ROUTER_ATTEMPTS_FAILED = Metric(
    "dualpath_router_attempts_failed",
    "counter",
    "Transfer attempts that ended without a load at the decode engine.",
    ("reason",),
)
ROUTER_PLANNED_TOKENS = Metric(
    "dualpath_router_planned_tokens",
    "counter",
    "Hit tokens that plans gave to the prefill side, the decode side, donors, or nobody (cache), "
    "counted when both sides have slots.",
    ("reader_role",),
)
ROUTER_DECISION_SECONDS = Metric(
    "dualpath_router_decision_seconds",
    "histogram",
    "Time the policy took for one decision; in `split` dividing a hit is one of its own.",
    buckets=_DECISION_BUCKETS,
)
ROUTER_WAIT_SECONDS = Metric(
    "dualpath_router_wait_seconds",
    "histogram",
    "Time requests waited for an engine below beta or with room.",
    buckets=_STAGE_BUCKETS,
)
ROUTER_WAITING = Metric(
    "dualpath_router_waiting", "gauge", "Requests that wait for an engine below beta or with room."
)
STORAGE_NIC_RATE = Metric(
    "dualpath_storage_nic_tokens_per_second",
    "gauge",
    "What an engine's storage NIC reads, as measured; 0 until it has read enough to tell.",
    ("engine",),
)
STORAGE_NIC_QUEUE_TOKENS = Metric(
    "dualpath_storage_nic_queue_tokens",
    "gauge",
    "Tokens planned to be read by an engine's storage NIC and not yet staged; in `split` those "
    "that have slots.",
    ("engine",),
)
ROUTER_REJECTED_MESSAGES = Metric(
    "dualpath_router_rejected_messages",
    "counter",
    "Messages from movers that broke the wire rules and were dropped.",
)

# --- engine --------------------------------------------------------------------------------------

STORAGE_READ_BYTES = Metric(
    "vllm:dualpath_storage_read_bytes", "counter", "Bytes read from the store by this engine."
)
DONATED_BYTES = Metric(
    "vllm:dualpath_donated_bytes",
    "counter",
    "Of the bytes read, those for requests of other engines.",
)
STORAGE_WRITE_BYTES = Metric(
    "vllm:dualpath_storage_write_bytes", "counter", "Bytes written to the store by this engine."
)
PUSH_BYTES = Metric(
    "vllm:dualpath_push_bytes",
    "counter",
    "Bytes pushed to a peer's staging memory over the compute network.",
    ("direction",),
)
HIT_TOKENS = Metric(
    "vllm:dualpath_hit_tokens",
    "counter",
    "Prompt tokens loaded from the store; on the engine that would have computed them.",
)
PROMPT_TOKENS = Metric(
    "vllm:dualpath_prompt_tokens", "counter", "Prompt tokens of requests the connector looked at."
)
CORRUPT_BLOCKS = Metric(
    "vllm:dualpath_corrupt_blocks", "counter", "Stored blocks that failed their check."
)
BLOCKS_NOT_STORED = Metric(
    "vllm:dualpath_blocks_not_stored",
    "counter",
    "New full blocks that were not stored: no free persist slot, or a slow or failing store.",
)
LOAD_FAILURES = Metric(
    "vllm:dualpath_load_failures", "counter", "Loads cut short or given up.", ("reason",)
)
STAGING_SLOTS = Metric(
    "vllm:dualpath_staging_slots", "gauge", "Staging slots: used, free, quarantined.", ("state",)
)
STAGE_SECONDS = Metric(
    "vllm:dualpath_stage_seconds",
    "histogram",
    "Time from the start of a staging to its publication.",
    buckets=_STAGE_BUCKETS,
)
LAYER_WAIT_SECONDS = Metric(
    "vllm:dualpath_layer_wait_seconds",
    "histogram",
    "Time the forward pass waited for a layer's copy, where it had to.",
    buckets=_WAIT_BUCKETS,
)
FENCE_WAIT_SECONDS = Metric(
    "vllm:dualpath_fence_wait_seconds",
    "histogram",
    "Time a step waited at its start for copies of the step before, where it had to.",
    buckets=_WAIT_BUCKETS,
)

READER_ROLES = ("prefill", "decode", "donor", "cache")
PUSH_DIRECTIONS = ("to_prefill", "to_decode")
SLOT_STATES = ("used", "free", "quarantined")
REQUEST_OUTCOMES = ("transferred", "short", "alone", "rejected", "cancelled", "failed")

ROUTER_METRICS = (
    ROUTER_REQUESTS,
    ROUTER_ATTEMPTS_FAILED,
    ROUTER_PLANNED_TOKENS,
    ROUTER_DECISION_SECONDS,
    ROUTER_WAIT_SECONDS,
    ROUTER_WAITING,
    STORAGE_NIC_RATE,
    STORAGE_NIC_QUEUE_TOKENS,
    ROUTER_REJECTED_MESSAGES,
)
ENGINE_METRICS = (
    STORAGE_READ_BYTES,
    DONATED_BYTES,
    STORAGE_WRITE_BYTES,
    PUSH_BYTES,
    HIT_TOKENS,
    PROMPT_TOKENS,
    CORRUPT_BLOCKS,
    BLOCKS_NOT_STORED,
    LOAD_FAILURES,
    STAGING_SLOTS,
    STAGE_SECONDS,
    LAYER_WAIT_SECONDS,
    FENCE_WAIT_SECONDS,
)
