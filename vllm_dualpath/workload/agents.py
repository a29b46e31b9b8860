"""Who replays which trajectory, and when they come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.workload.trajectories import TrajectorySet


@dataclass(frozen=True, slots=True)
class AgentSet:
    """Agent a comes at ``arrival_s[a]`` and replays ``trajectory[a]``.

    ``first_tokens[a]`` > 0 puts a random first turn before it, with an answer of one token, so
    that agents on the same trajectory share no prefix. Source: PAPER.md (A.3).
    """

    trajectory: npt.NDArray[np.int32]
    first_tokens: npt.NDArray[np.int32]
    arrival_s: npt.NDArray[np.float64]

    @property
    def num_agents(self) -> int:
        return len(self.trajectory)


def offline_agents(
    trajectories: TrajectorySet, num_agents: int, seed: int, max_first_tokens: int = 256
) -> AgentSet:
    """All agents at once: each trajectory in turn, then again behind a random first turn."""
    if num_agents < 1:
        raise ConfigError(f"agents: expected at least 1, found {num_agents}")
    return _assign(trajectories, np.zeros(num_agents), seed, max_first_tokens)


def poisson_agents(
    trajectories: TrajectorySet,
    agents_per_s: float,
    duration_s: float,
    seed: int,
    max_first_tokens: int = 256,
) -> AgentSet:
    """Agents that come at random, ``agents_per_s`` on average, for ``duration_s``.

    Their number is ``agents_per_s * duration_s`` exactly: given its number a Poisson process's
    arrivals are independent and uniform, and a fixed one takes a source of noise out of
    comparisons.
    """
    if agents_per_s <= 0 or duration_s <= 0:
        raise ConfigError(
            f"arrivals: expected a rate and a duration above 0, found {agents_per_s} and "
            f"{duration_s}"
        )
    count = max(1, round(agents_per_s * duration_s))
    arrival_s = np.sort(np.random.default_rng([seed, 1]).random(count)) * duration_s
    return _assign(trajectories, arrival_s, seed, max_first_tokens)


def _assign(
    trajectories: TrajectorySet,
    arrival_s: npt.NDArray[np.float64],
    seed: int,
    max_first_tokens: int,
) -> AgentSet:
    random = np.random.default_rng([seed, 0])
    count, distinct = len(arrival_s), trajectories.num_trajectories
    rounds = [random.permutation(distinct) for _ in range(-(-count // distinct))]
    first = random.integers(1, max_first_tokens + 1, size=count)
    first[:distinct] = 0
    return AgentSet(
        np.concatenate(rounds)[:count].astype(np.int32), first.astype(np.int32), arrival_s
    )
