"""Agent trajectories and their arrivals: what drives the simulator and, later, a real cluster.

Knows nothing of engines, policies or clocks: token counts and times only.
"""

from __future__ import annotations

from vllm_dualpath.workload.agents import AgentSet, offline_agents, poisson_agents
from vllm_dualpath.workload.generate import generate_trajectories
from vllm_dualpath.workload.recorded import load_trajectories, save_trajectories
from vllm_dualpath.workload.statistics import PAPER_TRACES, TraceStatistics, measure_statistics
from vllm_dualpath.workload.trajectories import TrajectorySet

__all__ = [
    "PAPER_TRACES",
    "AgentSet",
    "TraceStatistics",
    "TrajectorySet",
    "generate_trajectories",
    "load_trajectories",
    "measure_statistics",
    "offline_agents",
    "poisson_agents",
    "save_trajectories",
]
