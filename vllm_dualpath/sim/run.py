"""Runs one simulation: trace, agents, settings, the core, and its result."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from vllm_dualpath import native
from vllm_dualpath.errors import ConfigError, SimulationStalled
from vllm_dualpath.sim.assumptions import Assumptions, load_assumptions
from vllm_dualpath.sim.config import SimulationConfig
from vllm_dualpath.sim.results import SimulationResult, make_result
from vllm_dualpath.sim.settings import core_settings
from vllm_dualpath.workload import (
    PAPER_TRACES,
    AgentSet,
    TrajectorySet,
    generate_trajectories,
    load_trajectories,
    measure_statistics,
    offline_agents,
    poisson_agents,
)


def run_simulation(
    config: SimulationConfig, assumptions: Assumptions | None = None
) -> SimulationResult:
    """One run; equal arguments give equal results.

    Raises ConfigError for what cannot work, SimulationStalled when faults left agents that no
    engine can serve.
    """
    known = load_assumptions(None) if assumptions is None else assumptions
    trajectories = scaled_trace(config, known)
    agents = _agents(config, known, trajectories)
    return simulate_agents(config, known, trajectories, agents)


def simulate_agents(
    config: SimulationConfig,
    assumptions: Assumptions,
    trajectories: TrajectorySet,
    agents: AgentSet,
) -> SimulationResult:
    """The same with agents of one's own; ``config``'s trace and load are not looked at."""
    try:
        settings = core_settings(config, assumptions, measure_statistics(trajectories))
        raw = native.simulate(
            settings,
            trajectories.offsets,
            trajectories.append_tokens,
            trajectories.generated_tokens,
            agents.trajectory,
            agents.first_tokens,
            agents.arrival_s,
        )
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    except RuntimeError as exc:
        raise SimulationStalled(str(exc)) from exc
    return make_result(config, settings, raw)


@lru_cache(maxsize=8)
def load_trace(name: str, num_trajectories: int, seed: int) -> TrajectorySet:
    """One of the paper's traces, drawn with ``seed``, or a recorded one."""
    if name in PAPER_TRACES:
        return generate_trajectories(PAPER_TRACES[name], num_trajectories, seed)
    path = Path(name)
    if not path.exists():
        known = ", ".join(PAPER_TRACES)
        raise ConfigError(f"trace: expected {known} or a file of trajectories, found {name!r}")
    return load_trajectories(path)


def scaled_trace(config: SimulationConfig, assumptions: Assumptions) -> TrajectorySet:
    """The trajectories that ``config``'s agents follow."""
    trace = load_trace(config.trace, assumptions.trace.num_trajectories, config.seed)
    return trace.scaled(append=config.append_scale, generated=config.generated_scale)


def _agents(
    config: SimulationConfig, assumptions: Assumptions, trajectories: TrajectorySet
) -> AgentSet:
    first = assumptions.trace.max_first_tokens
    if config.agents is not None:
        return offline_agents(trajectories, config.agents, config.seed, first)
    assert config.agents_per_s is not None  # checked by SimulationConfig
    return poisson_agents(trajectories, config.agents_per_s, config.duration_s, config.seed, first)
