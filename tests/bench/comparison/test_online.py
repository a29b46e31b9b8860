"""The search for the highest rate within limits."""

from __future__ import annotations

import pytest

from vllm_dualpath.bench.comparison.online import (
    Limits,
    RateRange,
    arrivals,
    highest_rate,
    observed,
)
from vllm_dualpath.bench.comparison.settings import ComparisonPlan
from vllm_dualpath.errors import ConfigError

from .synthetic import SPLIT


def test_bisection_comes_close_to_the_limit_from_below() -> None:
    """What is returned was within limits, and a few runs bring it near."""
    tried = []

    def within(rate: float) -> bool:
        tried.append(rate)
        return rate <= 0.3

    best = highest_rate(within, RateRange(0.1, 1.0, num_runs=8))
    assert best is not None
    assert 0.27 <= best <= 0.3
    assert len(tried) == 8


def test_no_rate_is_within_limits() -> None:
    """Then there is none, after one run."""
    assert highest_rate(lambda _: False, RateRange(0.1, 1.0)) is None


def test_all_rates_are_within_limits() -> None:
    """Then it is the highest of the range, after two runs."""
    assert highest_rate(lambda _: True, RateRange(0.1, 1.0)) == 1.0


def test_the_same_agents_come_at_every_rate_only_sooner() -> None:
    """Arrivals scale with the rate, so that rates differ in nothing else."""
    plan = ComparisonPlan(agents=5)
    slow, fast = arrivals(plan, 0.1), arrivals(plan, 0.2)
    assert slow == pytest.approx([2 * at for at in fast])
    assert max(slow) <= 50.0
    assert plan.replay_plan(slow).agents == 5


def test_a_run_without_a_time_per_token_keeps_no_limit() -> None:
    """Answers of one token say nothing about the time of those after."""
    assert observed(SPLIT) is None
    assert not Limits(10.0, 10.0).kept_by(SPLIT)


@pytest.mark.parametrize("text", ["", "x", "0-1", "2-1", "-1"])
def test_other_ranges_are_refused(text: str) -> None:
    """The message names the flag."""
    with pytest.raises(ConfigError, match="--rate"):
        RateRange.parse(text)
