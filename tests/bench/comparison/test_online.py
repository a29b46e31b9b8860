"""The search for the highest rate within limits."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from vllm_dualpath.bench.comparison.measures import Run
from vllm_dualpath.bench.comparison.online import (
    Limits,
    RateRange,
    arrivals,
    highest_rate,
    observed,
    search,
)
from vllm_dualpath.bench.comparison.session import Session
from vllm_dualpath.bench.comparison.settings import ComparisonPlan
from vllm_dualpath.bench.completion import Completion
from vllm_dualpath.bench.replay import ReplayPlan, ReplayResult
from vllm_dualpath.errors import ConfigError

from .synthetic import SPLIT, TOPOLOGY, run


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


class _Queue:
    """A cluster whose first tokens come late once agents come faster than it can serve."""

    topology = TOPOLOGY

    def run(self, mode: str, repeat: int, plan: ReplayPlan) -> Run:
        capacity = {"prefill_only": 0.2, "split": 0.4}[mode]
        spread_s = max(plan.arrivals_s)
        base = run("split", 6.0, {}, repeat)
        late = Completion((1, 2), (9.0 if spread_s * capacity < 2 else 0.5, 9.1))
        records = tuple(replace(each, completion=late) for each in base.result.records)
        return replace(base, result=ReplayResult(6.0, records))


def test_the_search_finds_each_modes_own_rate() -> None:
    """Every run is told, and the mode that serves twice as much gets the higher rate."""
    plan = ComparisonPlan(agents=4, modes=("prefill_only", "split"))
    lines: list[str] = []
    rates, limits = RateRange(0.01, 2.0, 6), Limits(5.0, 10.0)
    session = cast(Session, _Queue())
    found = search(session, plan, ("prefill_only", "split"), rates, limits, lines.append)
    slow, fast = (found[mode]["highest_agents_per_s"] for mode in ("prefill_only", "split"))
    assert 0.01 <= slow < fast <= 2.0
    assert len(found["split"]["runs"]) == 6
    assert len(lines) == 12


@pytest.mark.parametrize("text", ["", "x", "0-1", "2-1", "-1"])
def test_other_ranges_are_refused(text: str) -> None:
    """The message names the flag."""
    with pytest.raises(ConfigError, match="--rate"):
        RateRange.parse(text)
