"""Agents that come at random: the highest rate at which latencies stay within limits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dualpath.bench.comparison.measures import Run
from vllm_dualpath.bench.comparison.session import Session
from vllm_dualpath.bench.comparison.settings import CompareMode, ComparisonPlan, Say
from vllm_dualpath.bench.statistics import percentile
from vllm_dualpath.errors import ConfigError

_SHARE = 0.9
"""Limits hold for this share of requests: of a few dozen, the 99th percentile is one request."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What users would still accept, in seconds."""

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.tpot_s > 0):
            raise ConfigError(
                f"limits: expected seconds above 0, found {self.ttft_s} and {self.tpot_s}"
            )

    def kept_by(self, run: Run) -> bool:
        """Whether the run's 90th percentiles are within, and nothing failed."""
        found = observed(run)
        if run.result.num_failed or found is None:
            return False
        return found[0] <= self.ttft_s and found[1] <= self.tpot_s


def observed(run: Run) -> tuple[float, float] | None:
    """90th percentiles of TTFT and TPOT; ``None`` if nothing was answered."""
    first = sorted(done.ttft_s for done in run.result.completions)
    each = sorted(done.tpot_s for done in run.result.completions if done.tpot_s is not None)
    return (percentile(first, _SHARE), percentile(each, _SHARE)) if first and each else None


@dataclass(frozen=True, slots=True)
class RateRange:
    """Agents a second: where the search begins and ends, and how many runs it may take."""

    low: float
    high: float
    num_runs: int = 5

    @classmethod
    def parse(cls, text: str) -> RateRange:
        """Parse ``LOW-HIGH``. Raises ``ConfigError``."""
        low, _, high = text.partition("-")
        try:
            parsed = cls(float(low), float(high or low))
        except ValueError as exc:
            raise ConfigError(f"--rate: expected LOW-HIGH agents a second, found {text!r}") from exc
        if not 0 < parsed.low <= parsed.high < math.inf:
            raise ConfigError(f"--rate: expected 0 < LOW <= HIGH, found {text!r}")
        return parsed


def highest_rate(within: Callable[[float], bool], rates: RateRange) -> float | None:
    """The highest rate found to be within limits, by bisection of the range's logarithm.

    ``None`` if not even the lowest is.
    """
    if not within(rates.low):
        return None
    best, low, high = rates.low, math.log(rates.low), math.log(rates.high)
    if rates.high > rates.low and within(rates.high):
        return rates.high
    for _ in range(rates.num_runs - 2):
        middle = (low + high) / 2
        if within(math.exp(middle)):
            best, low = math.exp(middle), middle
        else:
            high = middle
    return best


def arrivals(plan: ComparisonPlan, agents_per_s: float) -> tuple[float, ...]:
    """When each agent comes. Given their number a Poisson process's arrivals are independent and
    uniform; the same seed gives the same ones at every rate, but for the scale.
    """
    generator = random.Random(f"{plan.seed}/arrivals")
    duration_s = plan.agents / agents_per_s
    return tuple(sorted(generator.random() * duration_s for _ in range(plan.agents)))


def search(
    session: Session,
    plan: ComparisonPlan,
    modes: Sequence[CompareMode],
    rates: RateRange,
    limits: Limits,
    say: Say,
) -> dict[str, Any]:
    """For each mode the highest rate within limits, and every run that led to it."""
    found: dict[str, Any] = {}
    for mode in modes:
        tried: list[dict[str, Any]] = []

        def within(rate: float, mode: CompareMode = mode, tried: list[Any] = tried) -> bool:
            replay_plan = plan.replay_plan(arrivals(plan, rate))
            run = session.run(mode, len(tried), replay_plan)
            kept, seen = limits.kept_by(run), observed(run)
            tried.append(
                {
                    "agents_per_s": rate,
                    "within": kept,
                    "ttft_p90_s": seen[0] if seen else None,
                    "tpot_p90_s": seen[1] if seen else None,
                    "num_failed": run.result.num_failed,
                }
            )
            say(f"{session.topology} {mode}, {rate:.3g} agents/s: {tried[-1]}")
            return kept

        found[mode] = {"highest_agents_per_s": highest_rate(within, rates), "runs": tried}
    return found
