"""The measurement: every cell, every variant in turn, round after round."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import Any

from vllm_dualpath.bench.mover.machine import cpu_times, describe_machine, steal_share
from vllm_dualpath.bench.mover.pairing import in_turn
from vllm_dualpath.bench.processes import ManagedProcess, ProcessGuard
from vllm_dualpath.bench.router.client import load
from vllm_dualpath.bench.router.loop import run
from vllm_dualpath.bench.router.processes import Processes, cpu_s, find_theirs
from vllm_dualpath.bench.router.prompts import KINDS, STORED, Kind, request_bytes
from vllm_dualpath.bench.statistics import percentile
from vllm_dualpath.bench.vllm_command import HOST
from vllm_dualpath.errors import LaunchError

DIRECT, THEIRS, OURS, OURS_HITS = "direct", "vllm-router", "ours", "ours, hits"
_REQUESTS = "dualpath_router_requests_total{"
_PLANNED = "dualpath_router_planned_tokens_total{"
_EXPECTED = ("transferred", "short")
_WARM_UP_S = 0.1
_HTTP_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and for how long."""

    rounds: int
    turn_s: float
    mode: str = "split"
    transfer_all: bool = False
    """Short prompts, too."""
    theirs_path: Path | None = None
    pin: bool = True
    num_tokens: tuple[int, ...] = (100, 8000)
    kinds: tuple[Kind, ...] = KINDS
    connections: tuple[int, ...] = (1, 16)

    @property
    def cells(self) -> list[Cell]:
        return [
            Cell(kind, tokens, connections)
            for kind in self.kinds
            for tokens in self.num_tokens
            for connections in self.connections
        ]


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load."""

    kind: Kind
    num_tokens: int
    num_connections: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One variant under one load for a moment."""

    p50_s: float
    cpu_s: float
    """Of the router's process, a request."""
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Every turn, by cell and variant, in the order of the rounds."""

    plan: Plan
    machine: dict[str, Any]
    turns: dict[Cell, dict[str, list[Turn]]]
    outcomes: dict[str, int]
    """How our router served its requests, by its own count."""
    hit_tokens: int
    """That it planned to be read."""

    @property
    def has_theirs(self) -> bool:
        return any(THEIRS in turns for turns in self.turns.values())


def short_plan(mode: str, transfer_all: bool, theirs_path: Path | None, pin: bool) -> Plan:
    """Under a minute."""
    return Plan(3, 0.25, mode, transfer_all, theirs_path, pin)


def full_plan(mode: str, transfer_all: bool, theirs_path: Path | None, pin: bool) -> Plan:
    """Some minutes."""
    return Plan(9, 0.5, mode, transfer_all, theirs_path, pin)


def _our_flags(plan: Plan) -> list[str]:
    short = ["--short-prompt-tokens", "0"] if plan.transfer_all else []
    return ["--mode", plan.mode, *short]


def measure(plan: Plan, tick: Callable[[], None] = lambda: None) -> Measured:
    """Start everything, measure, stop everything. ``tick`` is called after each turn.

    Raises ``LaunchError`` for what does not start or answer, and where our router served a request
    neither by a transfer nor as a short one: what that costs is not what this benchmark is about.
    """
    guard = ProcessGuard()
    started_s, ticks = time.monotonic(), cpu_times()
    cores = _cores() if plan.pin else None
    affinity = os.sched_getaffinity(0)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="dualpath-bench-") as logs,
            Processes(
                Path(logs),
                guard,
                _our_flags(plan),
                find_theirs(plan.theirs_path),
                cores,
            ) as processes,
        ):
            if cores:
                os.sched_setaffinity(0, {cores[1]})
            turns = run(_measure_all(plan, processes, tick))
            metrics = _metrics(processes.ports.ours)
            outcomes = _outcomes(metrics, processes.ours)
    finally:
        os.sched_setaffinity(0, affinity)
        guard.close()
    machine = describe_machine(Path(tempfile.gettempdir()), cores)
    machine |= {"took_s": time.monotonic() - started_s, "vllm_router": _their_version(plan)}
    machine["steal_share"] = steal_share(ticks, cpu_times())
    hits = metrics.items()
    hit_tokens = sum(number for name, number in hits if name.startswith(_PLANNED))
    return Measured(plan, machine, turns, outcomes, hit_tokens)


async def _measure_all(
    plan: Plan, processes: Processes, tick: Callable[[], None]
) -> dict[Cell, dict[str, list[Turn]]]:
    variants = _variants(processes)
    turns: dict[Cell, dict[str, list[Turn]]] = {
        cell: {variant.name: [] for variant in variants} for cell in plan.cells
    }
    gc.collect()
    gc.disable()
    try:
        for cell in plan.cells:
            for variant in variants:
                await _turn(variant, cell, _WARM_UP_S)
        for round_idx in range(plan.rounds):
            for cell in plan.cells:
                for variant in in_turn(variants, round_idx):
                    turns[cell][variant.name].append(await _turn(variant, cell, plan.turn_s))
                    tick()
    finally:
        gc.enable()
    return turns


@dataclass(frozen=True, slots=True)
class _Variant:
    name: str
    port: int
    process: ManagedProcess | None
    numbers: Iterator[int]


def _variants(processes: Processes) -> list[_Variant]:
    ports = processes.ports
    # Nobody's prompt is ever seen twice, but the one that the store holds.
    numbers = count(STORED + 1)
    theirs = processes.theirs
    return [
        _Variant(DIRECT, ports.decode, None, numbers),
        *([_Variant(THEIRS, ports.theirs, theirs, numbers)] if theirs else []),
        _Variant(OURS, ports.ours, processes.ours, numbers),
        _Variant(OURS_HITS, ports.ours, processes.ours, repeat(STORED)),
    ]


async def _turn(variant: _Variant, cell: Cell, duration_s: float) -> Turn:
    request = request_bytes(cell.kind, cell.num_tokens)
    before_s = cpu_s(variant.process) if variant.process else 0.0
    started_s = time.perf_counter()
    times_s = await load(variant.port, request, cell.num_connections, duration_s, variant.numbers)
    took_s = time.perf_counter() - started_s
    used_s = cpu_s(variant.process) - before_s if variant.process else 0.0
    median_s = percentile(sorted(times_s), 0.5)
    return Turn(median_s, used_s / len(times_s), len(times_s) / took_s)


def _cores() -> tuple[int, int] | None:
    """One for whichever router is asked, one for all that surrounds it."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[1], allowed[0]) if len(allowed) > 1 else None


def _metrics(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=_HTTP_S) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line.startswith((_REQUESTS, _PLANNED)))
    return {name: int(float(value)) for name, _, value in samples}


def _outcomes(metrics: dict[str, int], router: ManagedProcess) -> dict[str, int]:
    counts = {n.split('"')[1]: num for n, num in metrics.items() if n.startswith(_REQUESTS)}
    others = {name: num for name, num in counts.items() if num and name not in _EXPECTED}
    if others:
        raise LaunchError(
            f"our router served requests in ways that are not measured: {others}; its log ends:\n"
            f"{router.log_tail()}"
        )
    return counts


def _their_version(plan: Plan) -> str | None:
    path = sys.path if plan.theirs_path is None else [str(plan.theirs_path)]
    found = importlib.metadata.distributions(name="vllm-router", path=path)
    return next((each.version for each in found), None)
