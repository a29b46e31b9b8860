"""The contract of a policy: a pure function from a snapshot and a request to a decision.

No clock, no randomness, no I/O. Ties break by engine id. The same code runs in the router and in
the simulator, and passes the same golden cases (``tests/policy/golden``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vllm_dualpath.plan import ReadPlan


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the router knows of one engine when it decides."""

    engine_id: str
    role: str
    """``prefill`` or ``decode``."""
    num_requests: int
    """Unfinished requests assigned to the engine (the paper's seq_e)."""
    num_tokens: int
    """Their tokens (tok_e)."""
    read_queue_tokens: int
    """Tokens planned to be read by its node's storage NIC and not yet staged (read_q)."""
    capacity_tokens: int
    """Tokens of KV cache and staging that one request may take."""


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """Engines that can serve now, sorted by engine id."""

    prefill: tuple[EngineLoad, ...]
    decode: tuple[EngineLoad, ...]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """One request to place."""

    num_tokens: int
    num_hit_blocks: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request runs and who reads its hit blocks."""

    prefill_engine: str
    decode_engine: str
    plan: ReadPlan


class Policy(Protocol):
    """``decide`` returns ``None`` when no pair of engines can take the request."""

    @property
    def mode(self) -> str: ...

    def decide(self, snapshot: ClusterSnapshot, request: PlanRequest) -> Decision | None: ...
