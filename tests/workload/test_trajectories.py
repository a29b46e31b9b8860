"""Traces: their statistics, their arrays, and files of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_dualpath.errors import ConfigError
from vllm_dualpath.workload import (
    PAPER_TRACES,
    TrajectorySet,
    generate_trajectories,
    load_trajectories,
    measure_statistics,
    offline_agents,
    poisson_agents,
    save_trajectories,
)
from vllm_dualpath.workload.statistics import TraceStatistics

TWO = TrajectorySet.from_turns([[(100, 10), (20, 5)], [(7, 1)]])


@pytest.mark.parametrize("name", PAPER_TRACES)
@pytest.mark.parametrize("seed", range(3))
def test_a_generated_trace_has_the_columns_of_table_2(name: str, seed: int) -> None:
    """All five columns within 2 %, and no trajectory beyond the limit."""
    target = PAPER_TRACES[name]
    found = measure_statistics(generate_trajectories(target, 500, seed))
    for column in ("turns", "append_tokens", "generated_tokens", "total_tokens", "mean_context"):
        assert getattr(found, column) == pytest.approx(getattr(target, column), rel=0.02), column
    assert found.max_len <= target.max_len


def test_the_same_seed_gives_the_same_trace() -> None:
    """Equal arrays for equal seeds, others for another seed."""
    first, again, other = (generate_trajectories(PAPER_TRACES["32k"], 20, s) for s in (1, 1, 2))
    assert np.array_equal(first.append_tokens, again.append_tokens)
    assert np.array_equal(first.generated_tokens, again.generated_tokens)
    assert not np.array_equal(first.append_tokens, other.append_tokens)


def test_prompts_are_everything_before_and_the_append() -> None:
    """A prompt restarts with each trajectory and leaves its own answer out."""
    assert TWO.prompt_tokens().tolist() == [100, 130, 7]
    assert TWO.total_tokens().tolist() == [135, 8]
    assert TWO.turns(0) == [(100, 10), (20, 5)]


def test_statistics_are_means_of_the_trajectories_own_means() -> None:
    """A short trajectory counts as much as a long one."""
    found = measure_statistics(TWO)
    assert found == TraceStatistics(135, 1.5, (60 + 7) / 2, (7.5 + 1) / 2, 143 / 2, (115 + 7) / 2)


def test_scaling_keeps_the_turns_and_at_least_one_token() -> None:
    """Appends double, answers shrink to no less than 1."""
    scaled = TWO.scaled(append=2.0, generated=0.01)
    assert scaled.append_tokens.tolist() == [200, 40, 14]
    assert scaled.generated_tokens.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "columns", [(100, 10, 5, 1, 100, 50), (1000, 2, 10, 10, 100, 50), (1000, 10, 20, 5, 150, 170)]
)
def test_statistics_that_no_trace_has_are_refused(columns: tuple[float, ...]) -> None:
    """Totals beyond the limit or the product, contexts beyond the total."""
    max_len, *others = columns
    with pytest.raises(ConfigError, match="trace"):
        generate_trajectories(TraceStatistics(int(max_len), *others), 300, 0)


def test_a_saved_trace_comes_back(tmp_path: Path) -> None:
    """Every turn of every trajectory."""
    save_trajectories(TWO, tmp_path / "trace.jsonl")
    loaded = load_trajectories(tmp_path / "trace.jsonl")
    assert [loaded.turns(i) for i in range(2)] == [TWO.turns(i) for i in range(2)]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[[1]]", "[[0, 1]]", "[[1, -1]]", "[[1.5, 1]]", "nonsense", "[[1, 1e]]"],
)
def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    """One message with file and line, whatever the line holds."""
    path = tmp_path / "trace.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="trace"):
        load_trajectories(path)


def test_more_agents_than_trajectories_get_a_first_turn_of_their_own() -> None:
    """The first round replays each trajectory once as it is; later ones have a random prefix."""
    agents = offline_agents(TWO, 5, seed=3)
    assert sorted(agents.trajectory[:2].tolist()) == [0, 1]
    assert agents.first_tokens[:2].tolist() == [0, 0]
    assert agents.first_tokens[2:].min() >= 1
    assert agents.arrival_s.max() == 0


def test_poisson_agents_come_in_order_and_in_their_number() -> None:
    """Rate x duration agents, sorted, inside the duration, with a Poisson process's gaps."""
    agents = poisson_agents(TWO, 2.0, 1000.0, seed=5)
    gaps = np.diff(agents.arrival_s)
    assert agents.num_agents == 2000
    assert gaps.min() >= 0
    assert agents.arrival_s[-1] < 1000.0
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ConfigError, match="arrivals"):
        poisson_agents(TWO, 0.0, 10.0, seed=1)
