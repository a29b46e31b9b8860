"""The most agents a second that a cluster serves within its objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.sim.assumptions import Assumptions
from vllm_dualpath.sim.config import SimulationConfig
from vllm_dualpath.sim.results import SimulationResult
from vllm_dualpath.sim.run import run_simulation


@dataclass(frozen=True, slots=True)
class Objectives:
    """Bounds on the mean TTFT and TPOT. Source: the paper's section 7."""

    first_token_s: float = 4.0
    per_token_s: float = 0.05

    def are_met(self, result: SimulationResult) -> bool:
        """Whether a run stayed within both, to its end."""
        return result.meets(self.first_token_s, self.per_token_s)


def find_capacity(
    config: SimulationConfig,
    objectives: Objectives | None = None,
    assumptions: Assumptions | None = None,
    tolerance: float = 0.02,
) -> float:
    """The largest rate found to meet the objectives, to within ``tolerance``; 0.0 if none does.

    ``config`` is an online one; its rate is where the search begins. Every rate is run with the
    same seed, so that modes are compared on the same agents.
    """
    if config.agents_per_s is None:
        raise ConfigError(
            "capacity: expected an online load (agents_per_s, --rate): where the search begins"
        )
    bounds = objectives or Objectives()

    def is_met(rate: float) -> bool:
        tried = config.model_copy(update={"agents_per_s": rate})
        return bounds.are_met(run_simulation(tried, assumptions))

    good, bad = _bracket(is_met, config.agents_per_s)
    while good > 0 and bad / good > 1 + tolerance:
        middle = (good * bad) ** 0.5
        good, bad = (middle, bad) if is_met(middle) else (good, middle)
    return good


def _bracket(is_met: Callable[[float], bool], start: float) -> tuple[float, float]:
    """A rate that meets the objectives (0.0: none down to a thousandth) and a higher one not."""
    rate = start
    if is_met(rate):
        while is_met(rate * 2):
            rate *= 2
        return rate, rate * 2
    while rate > start / 1000:
        rate /= 2
        if is_met(rate):
            return rate, rate * 2
    return 0.0, rate
