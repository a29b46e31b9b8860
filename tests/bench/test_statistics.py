"""Percentiles by nearest rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_dualpath.bench.statistics import percentile, summarize


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_is_a_value_with_enough_values_below(
    values: list[float], share: float
) -> None:
    """At least ``share`` of the sample is not above the percentile."""
    ordered = sorted(values)
    result = percentile(ordered, share)
    assert result in ordered
    assert sum(value <= result for value in ordered) >= share * len(ordered) - 1e-9


def test_known_sample() -> None:
    """1..100: the median is 50, the 99th percentile 99; missing values are left out."""
    summary = summarize([None, *map(float, range(1, 101))])
    assert summary is not None
    assert (summary.mean, summary.p50, summary.p99) == (50.5, 50.0, 99.0)
    assert summarize([None]) is None
