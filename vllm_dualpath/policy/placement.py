"""Which engines take a request: the part all policies have in common. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_dualpath.plan import ReadPlan, Segment
from vllm_dualpath.policy.base import ClusterSnapshot, EngineLoad, PlanRequest


def place(snapshot: ClusterSnapshot, request: PlanRequest) -> tuple[EngineLoad, EngineLoad] | None:
    """The (prefill, decode) engines for ``request``, or None where a side has none for it."""
    prefill = least_loaded(snapshot.prefill, request.num_tokens)
    decode = least_loaded(snapshot.decode, request.num_tokens)
    return None if prefill is None or decode is None else (prefill, decode)


def least_loaded(engines: Sequence[EngineLoad], num_tokens: int) -> EngineLoad | None:
    """The engine with the fewest tokens that has room for ``num_tokens``; ties by engine id.

    Tokens rather than requests: agent prompts differ in length by two orders of magnitude.
    """
    fitting = [engine for engine in engines if engine.capacity_tokens >= num_tokens]
    return min(fitting, key=lambda engine: (engine.num_tokens, engine.engine_id), default=None)


def two_part_plan(num_hit_blocks: int, first: str, num_first: int, second: str) -> ReadPlan:
    """``first`` reads the leading ``num_first`` hit blocks, ``second`` the rest; empty parts go."""
    parts = (Segment(first, 0, num_first), Segment(second, num_first, num_hit_blocks))
    return ReadPlan(num_hit_blocks, tuple(part for part in parts if part.num_blocks > 0))
