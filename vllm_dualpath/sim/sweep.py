"""Our policies against the paper's, cell by cell of a sweep, with the same agents for both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from vllm_dualpath.sim.assumptions import Assumptions
from vllm_dualpath.sim.bounds import throughput_bounds
from vllm_dualpath.sim.config import SimulationConfig, make_config
from vllm_dualpath.sim.results import SimulationResult, Summary
from vllm_dualpath.sim.run import run_simulation, scaled_trace

BASE_MODE = "dual"
METRICS = ("ttft_p50", "ttft_p99", "tpot", "job", "staged", "storage_balance")
# Two-sided 95 % of Student's t by degrees of freedom.
_STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


@dataclass(frozen=True, slots=True)
class SweepScope:
    """The grid. A load is a share of what the tightest bound allows; None: offline."""

    model: str = "ds-27b"
    nodes: tuple[tuple[int, int], ...] = ((1, 1), (2, 1), (1, 2))
    traces: tuple[str, ...] = ("32k", "64k")
    append_scales: tuple[float, ...] = (1.0, 4.0)
    tool_times_s: tuple[float, ...] = (0.0, 20.0)
    loads: tuple[float | None, ...] = (0.05, 0.4, 0.85, None)
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    offline_agents: int = 300
    duration_s: float = 1500.0
    warm_up_s: float = 700.0


@dataclass(frozen=True, slots=True)
class CellKey:
    """One point of the grid."""

    nodes: tuple[int, int]
    trace: str
    append_scale: float
    tool_time_s: float
    load: float | None

    def label(self) -> str:
        """For a table."""
        load = "offline" if self.load is None else f"load {self.load:g}"
        return (
            f"{self.nodes[0]}P{self.nodes[1]}D {self.trace} append x{self.append_scale:g} "
            f"tool {self.tool_time_s:g} s {load}"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A mode's metric over the base mode's: geometric mean over seeds and its 95 % interval."""

    ratio: float
    low: float
    high: float

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval lies above 1."""
        return self.low > 1.0


@dataclass(frozen=True, slots=True)
class SweepCell:
    """A point's comparisons by metric, and what binds the base mode there."""

    key: CellKey
    mode: str
    binds: str
    comparisons: dict[str, Comparison]
    storage_balance: float
    """Of the mode itself, over 10 s, mean over seeds."""

    def to_json(self) -> dict[str, Any]:
        """As one of ``cells`` in the JSON file."""
        return {
            "cell": self.key.label(),
            "mode": self.mode,
            "binds": self.binds,
            "storage_max_over_mean": self.storage_balance,
            **{
                name: {"ratio": c.ratio, "low": c.low, "high": c.high, "worse": c.is_worse}
                for name, c in self.comparisons.items()
            },
        }


def run_sweep(
    scope: SweepScope,
    assumptions: Assumptions,
    modes: Sequence[str] = ("split", "pool"),
    started: Callable[[str], None] = lambda _: None,
) -> list[SweepCell]:
    """Every cell in every mode beside the base mode, on the same agents seed by seed."""
    cells = []
    for key in _keys(scope):
        started(key.label())
        offline = [_offline(scope, key, seed) for seed in scope.seeds]
        tightest = [_tightest(scope, key, config, assumptions) for config in offline]
        configs = [
            config if key.load is None else _online(scope, config, key.load * agents_per_s)
            for config, (_, agents_per_s) in zip(offline, tightest, strict=True)
        ]
        base = [_metrics(run_simulation(config, assumptions)) for config in configs]
        for mode in modes:
            changed = [config.model_copy(update={"mode": mode}) for config in configs]
            found = [_metrics(run_simulation(config, assumptions)) for config in changed]
            cells.append(_cell(key, mode, tightest[0][0], base, found))
    return cells


def _keys(scope: SweepScope) -> Iterator[CellKey]:
    axes = (scope.nodes, scope.traces, scope.append_scales, scope.tool_times_s, scope.loads)
    for point in product(*axes):
        yield CellKey(*point)


def _offline(scope: SweepScope, key: CellKey, seed: int) -> SimulationConfig:
    return make_config(
        model=scope.model,
        prefill_nodes=key.nodes[0],
        decode_nodes=key.nodes[1],
        mode=BASE_MODE,
        trace=key.trace,
        append_scale=key.append_scale,
        tool_time_s=key.tool_time_s,
        seed=seed,
        agents=scope.offline_agents,
    )


def _online(scope: SweepScope, offline: SimulationConfig, agents_per_s: float) -> SimulationConfig:
    """The same with agents that come one by one."""
    choices = {
        **offline.model_dump(),
        "agents": None,
        "agents_per_s": agents_per_s,
        "duration_s": scope.duration_s,
        "warm_up_s": scope.warm_up_s,
    }
    return make_config(**choices)


def _tightest(
    scope: SweepScope, key: CellKey, offline: SimulationConfig, assumptions: Assumptions
) -> tuple[str, float]:
    """The resource that binds the base mode, and the agents a second that it allows."""
    trace = scaled_trace(offline, assumptions)
    agents = scope.offline_agents if key.load is None else None
    shape = assumptions.model(scope.model)
    bound = throughput_bounds(assumptions, shape, trace, key.nodes, True, agents)[0]
    return bound.resource, bound.turns_per_s / float(trace.num_turns.mean())


def _metrics(result: SimulationResult) -> dict[str, float]:
    first = Summary.of(result.first_token_s)
    offline = result.config.agents is not None
    from_s = 0.0 if offline else result.config.warm_up_s
    return {
        "ttft_p50": first.p50,
        "ttft_p99": first.p99,
        "tpot": Summary.of(result.per_token_s).mean,
        # Online runs end at a time that is given: there an agent's own time stands for the JCT.
        "job": result.job_s if offline else Summary.of(result.agent_s).mean,
        "staged": Summary.of(result.staged_s).mean,
        "storage_balance": result.storage_balance(10.0, from_s),
    }


def _cell(
    key: CellKey,
    mode: str,
    binds: str,
    base: list[dict[str, float]],
    found: list[dict[str, float]],
) -> SweepCell:
    comparisons = {
        name: compare([b[name] for b in base], [f[name] for f in found]) for name in METRICS
    }
    balance = sum(f["storage_balance"] for f in found) / len(found)
    return SweepCell(key, mode, binds, comparisons, balance)


def compare(base: Sequence[float], found: Sequence[float]) -> Comparison:
    """Paired ratios; the interval is Student's on their logarithms."""
    logs = [math.log(f / b) if f > 0 and b > 0 else 0.0 for b, f in zip(base, found, strict=True)]
    mean = sum(logs) / len(logs)
    if len(logs) < 2:
        return Comparison(math.exp(mean), 0.0, math.inf)
    spread = sum((value - mean) ** 2 for value in logs) / (len(logs) - 1)
    half = _STUDENT_T.get(len(logs) - 1, 2.0) * math.sqrt(spread / len(logs))
    return Comparison(math.exp(mean), math.exp(mean - half), math.exp(mean + half))
