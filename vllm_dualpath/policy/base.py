"""What a policy is asked and what it answers. The contract is the C++ core's.

A decision depends on the view, the request and the policy's parameters alone: no clock, no
randomness, no I/O. Engines and nodes are indexes into the view; ties go to the lower one. The same
code runs in the router and in the simulator, and passes the same golden cases
(``tests/policy/golden``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

Segment = tuple[int, int, int]
"""(engine that reads, first block, last block)."""


class Verdict(IntEnum):
    """Whether a request has its place; the numbers are the core's."""

    PLACED = 0
    WAIT_PREFILL = 1
    """Every prefill engine is over beta or without room: try again when that changes."""
    WAIT_DECODE = 2
    """No decode engine has room."""
    IMPOSSIBLE = 3
    """No usable engine of a role could take it, even empty."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """One request to place."""

    num_tokens: int
    num_hit_blocks: int
    block_tokens: int
    reserve_tokens: int = 0
    """KV room it needs on its decode engine; 0: as many as ``num_tokens``."""
    turn: int = 0
    """Requests placed before it; only round robin looks."""
    cached: Sequence[tuple[int, int]] = ()
    """(engine, leading blocks of the prompt that it holds in its own cache)."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request runs and who reads its hit blocks; all but ``verdict`` if it is placed."""

    verdict: Verdict
    prefill: int
    decode: int
    num_cached_blocks: int
    """Leading blocks that are in the prefill engine's own cache, and not read."""
    num_recompute_blocks: int
    """Blocks at the end of the hit that are computed again, and not read."""
    segments: tuple[Segment, ...]
    """Cover the other hit blocks once, in order."""
    read_s: float
    """When the last reader is expected to end, from now."""
