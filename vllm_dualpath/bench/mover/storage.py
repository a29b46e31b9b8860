"""Reads and writes of Full Blocks through the store, beside ``fio``; and what checking costs.

``fio`` reads the store's own files, and writes as many of the same size in the same directory.
Both bypass the page cache; where the directory does not allow that there is no comparison.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dualpath.bench.mover import fio
from vllm_dualpath.bench.mover.budget import Budget
from vllm_dualpath.bench.mover.channel import Child
from vllm_dualpath.bench.mover.pairing import in_turn
from vllm_dualpath.bench.mover.shapes import SHAPES, Shape
from vllm_dualpath.bench.processes import ProcessGuard
from vllm_dualpath.blocks import ALIGNMENT_BYTES
from vllm_dualpath.errors import LaunchError

INFLIGHT_BYTES = 64 << 20

_CACHED_BYTES = 32 << 10
_MEMORY_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class StoragePlan:
    """What to measure."""

    directory: Path
    budget: Budget
    num_bytes: int = 128 << 20
    """Of each run."""


@dataclass(slots=True)
class StorageResult:
    """Seconds of each round by ``(shape, "read" | "write" | "read_unchecked", "ours" | "fio")``."""

    seconds: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)
    """Of one run of a shape."""
    missing: str | None = None
    """Why there is nothing to compare with."""
    store: dict[str, Any] = field(default_factory=dict)
    """What the store runs on."""


class StoreSide:
    """A store process with the blocks of one shape, and the fio runs that match it."""

    def __init__(self, shape: Shape, plan: StoragePlan, child: Child) -> None:
        self.shape = shape
        self._child = child
        self._directory = plan.directory / shape.name
        self._directory.mkdir()
        self.block_bytes = shape.geometry.slot_bytes + ALIGNMENT_BYTES
        self.num_blocks = shape.num_blocks(plan.num_bytes)
        self.depth = max(1, min(self.num_blocks, INFLIGHT_BYTES // self.block_bytes))
        self.choice: dict[str, Any] = child.call(
            "open", str(self._directory), shape.name, self.num_blocks, self.depth
        )
        self._files = [Path(path) for path in child.call("files")]

    def ours(self, action: str, round_idx: int) -> float:
        if action == "write":
            return float(self._child.call("write", str(round_idx)))
        return float(self._child.call("read", action == "read"))

    def fio(self, action: str) -> float:
        files = self._files if action == "read" else ()
        run = fio.FioRun(
            "read" if action == "read" else "write",
            self._directory,
            self.block_bytes,
            self.depth,
            self.num_blocks,
            files,
        )
        return fio.run_fio(run)


def measure_storage(
    plan: StoragePlan, logs: Path, guard: ProcessGuard, tick: Callable[[], None] = lambda: None
) -> StorageResult:
    """Run the plan. What it wrote is removed again."""
    result = StorageResult(missing=None if fio.is_installed() else fio.HOW_TO_INSTALL)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, plan.directory, ignore_errors=True)
        children = []
        for shape in SHAPES:  # side by side
            children.append(Child("storage", logs / f"storage-{shape.name}.log", guard))
            stack.callback(children[-1].close)
        sides = [
            StoreSide(shape, plan, child) for shape, child in zip(SHAPES, children, strict=True)
        ]
        for side in sides:
            result.num_bytes[side.shape.name] = side.block_bytes * side.num_blocks
            result.store = side.choice
        if not result.store["direct"]:
            result.missing = f"no direct I/O in {plan.directory}: {result.store['reason']}"
        for round_idx in plan.budget.rounds(tick):
            for side in sides:
                _round(side, round_idx, result)
    return result


def _round(side: StoreSide, round_idx: int, result: StorageResult) -> None:
    steps = [("read", "ours"), ("read", "fio"), ("write", "ours"), ("write", "fio")]
    if result.missing is not None:
        steps = [step for step in steps if step[1] == "ours"]
    # Last or first, and so beside a checked read in either order.
    steps.insert(0, ("read_unchecked", "ours"))
    for action, who in in_turn(steps, round_idx):
        try:
            seconds = side.ours(action, round_idx) if who == "ours" else side.fio(action)
        except LaunchError as exc:
            if who == "ours":
                raise
            result.missing = str(exc)
            continue
        result.seconds.setdefault((side.shape.name, action, who), []).append(seconds)


@dataclass(frozen=True, slots=True)
class Checksums:
    """GB/s of CRC32C on one core."""

    cached: float
    memory: float


def measure_checksums(logs: Path, guard: ProcessGuard, core: int | None) -> Checksums:
    """From cache and from memory."""
    child = Child("storage", logs / "checksums.log", guard, core)
    try:
        return Checksums(
            child.call("crc32c_gb_per_s", _CACHED_BYTES, 0.3),
            child.call("crc32c_gb_per_s", _MEMORY_BYTES, 0.5),
        )
    finally:
        child.close()
