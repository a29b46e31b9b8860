"""Copies of all pages between staging and the paged cache, beside memcpy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from vllm_dualpath.bench.mover.budget import Budget
from vllm_dualpath.bench.mover.channel import Child
from vllm_dualpath.bench.mover.pairing import in_turn
from vllm_dualpath.bench.mover.shapes import SHAPES
from vllm_dualpath.bench.processes import ProcessGuard

DIRECTIONS = ("load", "save")
"""Staging to cache, and back."""


@dataclass(slots=True)
class CopyResult:
    """Seconds of each round by ``(shape, direction, "copy" | "memcpy")``."""

    seconds: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)


def measure_copies(
    budget: Budget,
    num_bytes: int,
    logs: Path,
    guard: ProcessGuard,
    tick: Callable[[], None] = lambda: None,
) -> CopyResult:
    """Each on one thread: the queue's own, and the one that calls memcpy."""
    result = CopyResult()
    with ExitStack() as stack:
        children = {}
        for shape in SHAPES:
            child = Child("copies", logs / f"copies-{shape.name}.log", guard)
            stack.callback(child.close)
            children[shape.name] = child
            result.num_bytes[shape.name] = child.call(
                "open", shape.name, shape.num_blocks(num_bytes)
            )
            for method in ("copy", "memcpy"):
                child.call(method, True)
        for round_idx in budget.rounds(tick):
            for name, child in children.items():
                for direction in DIRECTIONS:
                    for method in in_turn(("copy", "memcpy"), round_idx):
                        seconds = child.call(method, direction == "load")
                        result.seconds.setdefault((name, direction, method), []).append(seconds)
    return result
