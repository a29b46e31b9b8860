"""What is worked out of counters and requests: shares, ratios, bounds, exactness, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from vllm_dualpath.bench.comparison.measures import RunUse
from vllm_dualpath.bench.comparison.page import (
    comparison_page,
    comparison_plots,
    what_eats_the_rest,
)
from vllm_dualpath.bench.comparison.record import Comparison, all_equal, comparison_json
from vllm_dualpath.bench.comparison.run import order
from vllm_dualpath.bench.comparison.settings import ComparisonPlan, Topology, parse_modes
from vllm_dualpath.errors import ConfigError

from .synthetic import PREFILL_ONLY, SPEC, SPLIT, found, run

PLAN = ComparisonPlan(modes=("prefill_only", "split"), repeats=1)


def test_the_steady_part_is_from_the_second_to_the_last_turn() -> None:
    """It begins with the first request of turn 1 and ends with that of the last turn."""
    steady = PREFILL_ONLY.steady
    assert steady.start_s - PREFILL_ONLY.start_s == pytest.approx(4.0)
    assert steady.length_s == pytest.approx(4.0)


def test_shares_are_bytes_over_what_the_nics_could_have_moved() -> None:
    """One NIC of two at 90 % is 45 % of both, and a balance of 2."""
    base, split = RunUse(PREFILL_ONLY, SPEC), RunUse(SPLIT, SPEC)
    assert base.steady_read_share() == pytest.approx(0.45)
    assert base.prefill_read_share(PREFILL_ONLY.steady) == pytest.approx(0.9)
    assert base.balance() == pytest.approx(2.0)
    assert split.steady_read_share() == pytest.approx(0.9)
    assert split.balance() == pytest.approx(1.0)


def test_a_nic_that_is_not_shaped_has_no_share() -> None:
    """Of the compute NICs, which have no rate here, only bytes are told."""
    assert [use.steady_share for use in RunUse(SPLIT, SPEC).nics("compute")] == [None, None]


def test_cpu_is_told_in_cores() -> None:
    """Busy seconds a second, and those the hypervisor took."""
    assert RunUse(SPLIT, SPEC).cpu_busy_cores() == pytest.approx((1.5, 0.1))


def test_ratios_pair_runs_of_one_repeat() -> None:
    """Each repeat's base run is compared with the same repeat's run of the mode."""
    second = [
        run("prefill_only", 9.0, {"prefill-0": 90.0}, repeat=1),
        run("split", 6.0, {"prefill-0": 90.0}, repeat=1),
    ]
    result = found(PREFILL_ONLY, second[0], SPLIT, second[1])
    assert result.ratios("split") == pytest.approx([2.0, 1.5])


def test_the_bound_is_for_the_share_of_time_that_storage_took() -> None:
    """Nine tenths of the time twice as fast, the rest as before."""
    assert found(PREFILL_ONLY, SPLIT).bound() == pytest.approx(1 / (0.1 + 0.9 / 2))


def test_one_token_that_differs_is_not_exact() -> None:
    """Every answer of every run counts."""
    assert all_equal([PREFILL_ONLY, SPLIT])
    assert not all_equal([PREFILL_ONLY, run("split", 6.0, {}, token=8)])
    assert not all_equal([])


def test_the_record_is_json_with_ratios_and_exactness() -> None:
    """As the README of the figures promises: ratios by topology and mode, and ``exact``."""
    record = json.loads(json.dumps(comparison_json(_comparison())))
    assert record["ratios"]["1P1D"] == {"prefill_only": 1.0, "split": 2.0}
    assert record["exact"] is True
    assert record["regime"]["1P1D"]["recompute_over_hit"] == 4.0
    read_s = 2048 * 65536 / 100e6
    assert record["regime"]["1P1D"]["recompute_over_read"] == pytest.approx(2.0 / read_s)
    assert record["regime"]["1P1D"]["prefill_storage_nic_busy_steady"] == pytest.approx(0.9)


def test_the_report_needs_no_network_and_shows_every_mode() -> None:
    """Nothing is loaded from elsewhere; bars, lines and the ideal are there."""
    page = comparison_page(_comparison())
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "split: storage NICs" in page
    assert "ideal, 1/2" in page


def test_the_report_says_what_eats_the_rest() -> None:
    """6 s of which reading took 5.4: two NICs of 100 MB/s each, 90 used."""
    result = found(PREFILL_ONLY, SPLIT)
    lines = what_eats_the_rest(result)
    assert lines[1].startswith("split: 6.0 s. All storage NICs together at their full rate would")
    assert "in 5.4 s" in lines[1]
    assert "busy 90% of the steady part's 2.0 s" in lines[1]
    assert "in 5.4 s" in comparison_page(_comparison())
    unshaped = replace(result, spec=replace(SPEC, storage_rate=None))
    assert what_eats_the_rest(unshaped) == []


def test_plots_are_files_of_their_own() -> None:
    """JCT and each mode's storage NICs, as SVG that any viewer opens."""
    files = comparison_plots(_comparison())
    assert set(files) == {"1p1d-jct.svg", "1p1d-prefill_only-storage.svg", "1p1d-split-storage.svg"}
    for drawing in files.values():
        assert ElementTree.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_baseline_is_no_part_of_our_exactness() -> None:
    """Its answers are compared with ours and told apart; one that failed has no ratio."""
    other = run("nixl", 8.0, {"prefill-0": 0.0})
    comparison = Comparison(PLAN, None, (found(PREFILL_ONLY, SPLIT, other),))
    assert (comparison.exact, comparison.baselines_exact) == (True, True)
    assert _comparison().baselines_exact is None
    first = other.result.records[0]
    failed = replace(first, completion=None, error="gone")
    broken = replace(other.result, records=(failed, *other.result.records[1:]))
    comparison = Comparison(
        PLAN, None, (found(PREFILL_ONLY, SPLIT, replace(other, result=broken)),)
    )
    assert (comparison.exact, comparison.baselines_exact) == (True, False)
    record = comparison_json(comparison)
    assert record["ratios"]["1P1D"]["nixl"] is None
    assert "1 requests failed" in comparison_page(comparison)


def test_repeats_run_the_modes_forwards_and_backwards() -> None:
    """Drift of the machine hits all modes alike; the oracle is no mode of a router."""
    modes = parse_modes("prefill_only,dual,oracle,split")
    assert order(modes, 0) == ["prefill_only", "dual", "split"]
    assert order(modes, 1) == ["split", "dual", "prefill_only"]


def test_the_ideal_is_all_nodes_over_prefill_nodes() -> None:
    """As in the paper for a load bound by storage alone."""
    assert [Topology.parse(text).ideal for text in ("1P1D", "1P2D", "2P1D")] == [2.0, 3.0, 1.5]


@pytest.mark.parametrize("text", ["", "1P", "0P1D", "1P0D", "P1D1"])
def test_other_topologies_are_refused(text: str) -> None:
    """The message names the flag."""
    with pytest.raises(ConfigError, match="--topology"):
        Topology.parse(text)


def test_a_comparison_without_its_base_is_refused() -> None:
    """All ratios are to prefill_only."""
    with pytest.raises(ConfigError, match="prefill_only among them"):
        ComparisonPlan(modes=("split",))


def test_a_default_agent_has_two_thousand_tokens_of_64_kib() -> None:
    """The regime that was fixed: contexts, KV a token, appends, answers."""
    plan = ComparisonPlan()
    assert plan.bytes_per_token >= 64 << 10
    assert plan.context >= 2048
    assert plan.append.high <= 50
    assert plan.generate <= 10


def test_contexts_are_what_the_first_turns_begin_with() -> None:
    """So that the first turn's prompt is a hit but for its last block."""
    plan = ComparisonPlan(agents=2)
    replayed = plan.replay_plan()
    for agent, context in enumerate(plan.contexts()):
        assert len(context) == plan.context
        assert tuple(replayed.appends(agent)[0][: plan.context]) == context


def _comparison() -> Comparison:
    return Comparison(PLAN, None, (found(PREFILL_ONLY, SPLIT),))
