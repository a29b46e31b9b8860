"""The whole benchmark: every part in turn, and what they found in one record."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dualpath.bench.mover.copies import CopyResult, measure_copies
from vllm_dualpath.bench.mover.latency import Latency, measure_callbacks, measure_notices
from vllm_dualpath.bench.mover.machine import cpu_times, describe_machine, steal_share
from vllm_dualpath.bench.mover.plan import Plan
from vllm_dualpath.bench.mover.puts import PutPlan, PutResult, measure_puts
from vllm_dualpath.bench.mover.staging import StagingResult, measure_staging
from vllm_dualpath.bench.mover.storage import (
    Checksums,
    StoragePlan,
    StorageResult,
    measure_checksums,
    measure_storage,
)
from vllm_dualpath.bench.processes import ProcessGuard
from vllm_dualpath.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was found."""

    machine: dict[str, Any]
    puts: PutResult
    storage: StorageResult
    checksums: Checksums
    copies: CopyResult
    staging: StagingResult
    notices: dict[str, Latency]
    callback: Latency
    plain_read: Latency


def measure(plan: Plan, show: Callable[[str], None], tick: Callable[[], None]) -> Measured:
    """Run every part. ``show`` is told what is measured now; ``tick`` is called often.

    All processes have ended and all files are gone when this returns or raises.
    Raises ``ConfigError`` for a directory that does not serve, ``LaunchError`` for what fails.
    """
    scratch = _make_scratch(plan.directory)
    guard = ProcessGuard()
    try:
        with tempfile.TemporaryDirectory(prefix="dualpath-bench-") as logs:
            return _measure(plan, scratch, Path(logs), guard, show, tick)
    finally:
        guard.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _measure(
    plan: Plan,
    scratch: Path,
    logs: Path,
    guard: ProcessGuard,
    show: Callable[[str], None],
    tick: Callable[[], None],
) -> Measured:
    started_s, ticks = time.monotonic(), cpu_times()
    machine = describe_machine(scratch, plan.cores)
    show("puts")
    put_plan = PutPlan(
        piece_bytes=plan.piece_bytes,
        budget=plan.puts,
        puts_per_turn=plan.puts_per_turn,
        nixl_path=plan.nixl_path,
        cores=plan.cores,
    )
    puts = measure_puts(put_plan, logs, guard, tick)
    show("storage")
    (scratch / "storage").mkdir()
    storage_plan = StoragePlan(scratch / "storage", plan.storage, plan.storage_bytes)
    storage = measure_storage(storage_plan, logs, guard, tick)
    show("checksums")
    checksums = measure_checksums(logs, guard, plan.cores and plan.cores[0])
    show("copies")
    copies = measure_copies(plan.copies, plan.copy_bytes, logs, guard, tick)
    show("latencies")
    notices = measure_notices(plan.num_pings, logs, guard)
    callback, plain_read = measure_callbacks(plan.num_pings, scratch / "callbacks", logs, guard)
    show("staging")
    staging = measure_staging(
        plan.staging, plan.staging_bytes, plan.idle_s, scratch / "staging", guard, logs, tick
    )
    machine["steal_share"] = round(steal_share(ticks, cpu_times()), 4)
    machine["took_s"] = round(time.monotonic() - started_s, 1)
    return Measured(
        machine, puts, storage, checksums, copies, staging, notices, callback, plain_read
    )


def _make_scratch(directory: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="dualpath-bench-", dir=directory))
    except OSError as exc:
        raise ConfigError(f"bench mover: {directory}: {exc}: name a writable directory") from exc
