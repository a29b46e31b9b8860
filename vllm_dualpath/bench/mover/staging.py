"""Staging over the decode path beside the read alone, and what idle movers cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vllm_dualpath.bench.mover.budget import Budget
from vllm_dualpath.bench.mover.channel import Child
from vllm_dualpath.bench.mover.pairing import in_turn
from vllm_dualpath.bench.mover.shapes import shape_named
from vllm_dualpath.bench.processes import ProcessGuard

SHAPE = "deepseek-v3.2"
"""Blocks small enough that a prompt has many of them, and of odd sizes."""

NUM_STALLED = 100
_WARM_UP = 3  # the first transfers touch the staging memory for the first time
_START_S = 90.0


@dataclass(slots=True)
class StagingResult:
    """Seconds of each round by ``"stage" | "read"``."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    num_bytes: int = 0
    idle_cpu_share: float = 0.0
    """Of one core, of the busier of two movers."""
    stalled_cpu_share: float = 0.0
    """As ``idle_cpu_share``, while ``NUM_STALLED`` transfers wait for a store that hangs."""


def measure_staging(
    budget: Budget,
    num_bytes: int,
    idle_s: float,
    directory: Path,
    guard: ProcessGuard,
    logs: Path,
    tick: Callable[[], None] = lambda: None,
) -> StagingResult:
    """Real movers, started for this; what they stored is removed again."""
    result = StagingResult()
    shape = shape_named(SHAPE)
    num_blocks = shape.num_blocks(num_bytes)
    result.num_bytes = num_blocks * shape.geometry.slot_bytes
    directory.mkdir()
    child = Child("movers", logs / "movers.log", guard)
    try:
        child.call("open", str(directory), SHAPE, num_blocks, timeout_s=_START_S)
        for _ in range(_WARM_UP):
            child.call("read")
            child.call("stage")
        for round_idx in budget.rounds(tick):
            for what in in_turn(("stage", "read"), round_idx):
                result.seconds.setdefault(what, []).append(child.call(what))
        result.idle_cpu_share = child.call("idle_cpu_share", idle_s)
        child.call("close")
        result.stalled_cpu_share = _measure_stalled(idle_s, guard, logs)
    finally:
        child.close()
        shutil.rmtree(directory, ignore_errors=True)
    return result


def _measure_stalled(idle_s: float, guard: ProcessGuard, logs: Path) -> float:
    child = Child("stalled-movers", logs / "stalled-movers.log", guard)
    try:
        child.call("open", NUM_STALLED, timeout_s=_START_S)
        share: float = child.call("cpu_share", idle_s)
        child.call("close")
    finally:
        child.close()
    return share
