from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dualpath.bench.mover.budget import Budget
from vllm_dualpath.bench.mover.pairing import in_turn, paired_ratio

SPEEDS = st.lists(st.floats(0.1, 10.0), min_size=3, max_size=30)


@given(SPEEDS, st.floats(0.5, 2.0))
def test_a_constant_ratio_is_found_whatever_the_machine_does(
    speeds: list[float], ratio: float
) -> None:
    """Where both runs of every pair are disturbed alike, ratio and interval are the true one."""
    found = paired_ratio([speed * ratio for speed in speeds], speeds)
    assert (found.median, found.low, found.high) == pytest.approx((ratio, ratio, ratio))
    assert found.num_pairs == len(speeds)


def test_the_ratio_is_the_median_of_the_pairs_ratios() -> None:
    """Not the ratio of the medians, which is 1.5 here."""
    assert paired_ratio([3.0, 2.0, 40.0], [1.0, 2.0, 10.0]).median == 3.0


def test_the_interval_covers_the_median_and_is_the_same_each_time() -> None:
    """Resampling has a fixed seed, and its interval lies around the result."""
    above = [1.0 + 0.01 * (idx * 7 % 11) for idx in range(11)]
    found = paired_ratio(above, [1.0] * 11)
    assert found == paired_ratio(above, [1.0] * 11)
    assert min(above) <= found.low < found.median < found.high <= max(above)


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_samples_that_do_not_pair_up_are_refused(above: list[float], below: list[float]) -> None:
    """A run that is missing must not shift all later pairs."""
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio(above, below)


def test_every_other_round_runs_backwards() -> None:
    """A B B A: a drift favours nobody."""
    order = [list(in_turn("AB", round_idx)) for round_idx in range(4)]
    assert order == [["A", "B"], ["B", "A"], ["A", "B"], ["B", "A"]]


def test_a_budget_bounds_the_rounds_both_ways() -> None:
    """Without time there are still the fewest rounds, with much time only the most."""
    ticks: list[None] = []
    assert list(Budget(0.0, 2, 9).rounds(lambda: ticks.append(None))) == [0, 1]
    assert list(Budget(1e9, 2, 4).rounds()) == [0, 1, 2, 3]
    assert len(ticks) == 2
