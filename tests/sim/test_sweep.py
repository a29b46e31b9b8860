"""The sweep of our policies against the paper's."""

from __future__ import annotations

import math

import pytest

from vllm_dualpath.sim.assumptions import paper_assumptions
from vllm_dualpath.sim.heatmap import heat_map
from vllm_dualpath.sim.sweep import SweepScope, compare, run_sweep

SMALL = SweepScope(
    nodes=((1, 1),),
    traces=("32k",),
    append_scales=(1.0,),
    tool_times_s=(0.0,),
    loads=(0.05, None),
    seeds=(0, 1, 2),
    offline_agents=30,
    duration_s=300.0,
    warm_up_s=100.0,
)


def test_equal_runs_have_a_ratio_of_one_and_no_interval() -> None:
    """A mode compared with itself is neither better nor worse."""
    same = compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.ratio, same.low, same.high) == (1.0, 1.0, 1.0)
    assert not same.is_worse


def test_the_interval_is_students_on_logarithms() -> None:
    """Ratios of 1, 2 and 4 by hand."""
    found = compare([1.0, 1.0, 1.0], [1.0, 2.0, 4.0])
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert found.ratio == pytest.approx(2.0)
    assert found.low == pytest.approx(math.exp(math.log(2) - half))
    assert found.high == pytest.approx(math.exp(math.log(2) + half))
    assert compare([1.0, 1.0, 1.0], [1.1, 1.1001, 1.0999]).is_worse


def test_split_stages_hits_in_about_half_the_time() -> None:
    """1P1D under light load, paired with `dual` on the same agents; the map has every cell."""
    cells = run_sweep(SMALL, paper_assumptions(), modes=("split",))
    light = next(cell for cell in cells if cell.key.load == 0.05)
    assert light.comparisons["staged"].ratio < 0.6
    picture = heat_map(cells, "split", "dual")
    assert picture.count("<title>") == 2 * 5
