"""What one decision costs: the policy through the Python API that the router calls.

One request comes and one leaves with each decision, so the cluster stays as full as it is. Knows
nothing of sockets or HTTP: what a router adds to a request is another benchmark.
"""

from __future__ import annotations

import gc
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from vllm_dualpath.bench.statistics import percentile
from vllm_dualpath.policy import (
    MODES,
    ClusterView,
    Decision,
    EngineState,
    NodeState,
    PlanRequest,
    Policy,
    Role,
    Verdict,
    WaitingLine,
    make_policy,
)

ENGINE_COUNTS = (16, 1152)
LIMITS_US = {16: 50.0, 1152: 300.0}
LEAST_PER_SECOND = 2000.0
NUM_OPEN = 48_000
"""Requests in the cluster, a sixth of them in the line."""

_ENGINES_A_NODE = 8
_BLOCK_TOKENS = 64
_WINDOW_S = 0.25


@dataclass(frozen=True, slots=True)
class PolicyTiming:
    """One mode on one size of cluster."""

    mode: str
    num_engines: int
    median_us: float
    """Of the call that decides."""
    p99_us: float
    decisions_per_second: float
    """With all bookkeeping of a request that comes and one that leaves."""
    least_per_second: float
    """In the slowest quarter of a second."""

    @property
    def within_limits(self) -> bool:
        fast = self.median_us <= LIMITS_US.get(self.num_engines, float("inf"))
        return fast and self.least_per_second >= LEAST_PER_SECOND


class _Load:
    """A cluster that is kept equally full: a third prefill engines, the rest decode."""

    def __init__(self, num_engines: int, policy: Policy) -> None:
        self._policy = policy
        self._random = random.Random(num_engines)
        num_nodes = -(-num_engines // _ENGINES_A_NODE)
        engines = [_engine(index, num_engines, num_nodes) for index in range(num_engines)]
        self._view = ClusterView([NodeState() for _ in range(num_nodes)], engines)
        self._view.nominal_read_rate = 1e6
        self._nodes = [engine.node for engine in engines]
        self._line = WaitingLine()
        self._open: deque[tuple[PlanRequest, Decision]] = deque()
        self._requests = self._draw()
        self._waiting: deque[PlanRequest] = deque()
        for _ in range(NUM_OPEN // 6):
            self._arrive()
        while len(self._open) < NUM_OPEN - NUM_OPEN // 6:
            self.step()

    def step(self) -> float:
        """One request is placed, one joins the line, one leaves; seconds of all decisions on it."""
        self._arrive()
        request = self._waiting.popleft()
        started_s = time.perf_counter()
        decision = self._policy.decide(self._view, request, self._line)
        assert decision.verdict is Verdict.PLACED
        if self._policy.divides_late:
            # The router does so when the request has its slots.
            self._policy.divide(
                self._view,
                decision.prefill,
                decision.decode,
                decision.num_cached_blocks,
                request.num_hit_blocks - decision.num_recompute_blocks,
                request.block_tokens,
            )
        took_s = time.perf_counter() - started_s
        self._line.pop()
        self._book(request, decision, 1)
        self._open.append((request, decision))
        if len(self._open) > NUM_OPEN - NUM_OPEN // 6:
            self._book(*self._open.popleft(), -1)
        return took_s

    def _arrive(self) -> None:
        request = next(self._requests)
        self._waiting.append(request)
        self._line.push(request.num_tokens)

    def _book(self, request: PlanRequest, decision: Decision, sign: int) -> None:
        tokens = sign * request.num_tokens
        self._view.add_load(decision.prefill, sign, tokens, tokens // 20, 0)
        self._view.add_load(decision.decode, sign, tokens, 0, tokens)
        for reader, first, last in decision.segments:
            self._view.add_reads(self._nodes[reader], sign * (last - first) * _BLOCK_TOKENS)

    def _draw(self) -> Iterator[PlanRequest]:
        while True:
            num_tokens = self._random.randint(1000, 64_000)
            yield PlanRequest(num_tokens, int(0.95 * num_tokens) // _BLOCK_TOKENS, _BLOCK_TOKENS)


def _engine(index: int, num_engines: int, num_nodes: int) -> EngineState:
    engine = EngineState()
    engine.role = Role.PREFILL if index < num_engines // 3 else Role.DECODE
    engine.node = index * num_nodes // num_engines
    engine.group = engine.node // 8
    return engine


def time_policy(mode: str, num_engines: int, duration_s: float) -> PolicyTiming:
    """Decide for ``duration_s`` seconds on a cluster that was filled before."""
    load = _Load(num_engines, make_policy(mode, alpha_s=3.0))
    gc.collect()
    gc.disable()
    try:
        times_s, windows = _measure(load, duration_s)
    finally:
        gc.enable()
    ordered = sorted(times_s)
    return PolicyTiming(
        mode,
        num_engines,
        1e6 * percentile(ordered, 0.5),
        1e6 * percentile(ordered, 0.99),
        sum(windows) / len(windows),
        min(windows),
    )


def _measure(load: _Load, duration_s: float) -> tuple[list[float], list[float]]:
    """Times of all decisions, and decisions a second in each window."""
    times_s: list[float] = []
    windows: list[float] = []
    ends_s = time.perf_counter() + duration_s
    while (window_s := time.perf_counter()) < ends_s:
        num_before = len(times_s)
        while (now_s := time.perf_counter()) < window_s + _WINDOW_S:
            times_s.append(load.step())
        windows.append((len(times_s) - num_before) / (now_s - window_s))
    return times_s, windows


def time_policies(duration_s: float, modes: Sequence[str] = MODES) -> list[PolicyTiming]:
    """Every mode on every size of cluster."""
    return [time_policy(mode, count, duration_s) for count in ENGINE_COUNTS for mode in modes]


def to_json(timings: Sequence[PolicyTiming]) -> dict[str, Any]:
    """Plain types, with the limits that the figures are held against."""
    return {
        "limits": {
            "median_us": {str(count): limit for count, limit in LIMITS_US.items()},
            "decisions_per_second": LEAST_PER_SECOND,
            "open_requests": NUM_OPEN,
        },
        "rows": [asdict(timing) | {"within_limits": timing.within_limits} for timing in timings],
    }


def policy_table(timings: Sequence[PolicyTiming]) -> Table:
    """A row a mode and size."""
    table = Table(
        title=f"One decision, {NUM_OPEN} requests open, one core",
        caption=f"limits: median {LIMITS_US[16]:.0f} µs at 16 engines, {LIMITS_US[1152]:.0f} µs at"
        f" 1152; {LEAST_PER_SECOND:.0f} decisions a second",
    )
    for name in ("mode", "engines", "median, µs", "p99, µs", "decisions/s", "least, 0.25 s"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in timings:
        table.add_row(
            row.mode,
            str(row.num_engines),
            f"{row.median_us:.1f}",
            f"{row.p99_us:.1f}",
            f"{row.decisions_per_second:,.0f}",
            f"{row.least_per_second:,.0f}",
        )
    return table
