"""The benchmark of decisions runs, and says what it holds its figures against."""

from __future__ import annotations

import json

from vllm_dualpath.bench.policy import PolicyTiming, policy_table, time_policy, to_json


def test_a_row_is_measured_and_reported() -> None:
    """Every figure is there, in the table and in the JSON; how large it is says nothing here."""
    timing = time_policy("pool", 16, 0.1)
    assert 0 < timing.median_us <= timing.p99_us
    assert 0 < timing.least_per_second <= timing.decisions_per_second
    report = json.loads(json.dumps(to_json([timing])))
    assert report["rows"][0]["mode"] == "pool"
    assert report["limits"]["open_requests"] == 48_000
    assert policy_table([timing]).row_count == 1


def test_a_figure_beyond_its_limit_is_told() -> None:
    """Each limit counts by itself."""
    good = PolicyTiming("dual", 1152, 300.0, 400.0, 5000.0, 2000.0)
    slow = PolicyTiming("dual", 1152, 300.1, 400.0, 5000.0, 2000.0)
    few = PolicyTiming("dual", 16, 50.0, 60.0, 5000.0, 1999.0)
    assert [row.within_limits for row in (good, slow, few)] == [True, False, False]
