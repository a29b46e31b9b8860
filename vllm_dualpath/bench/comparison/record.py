"""Everything a comparison found, as JSON: ratios, exactness, the regime, every run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_dualpath.bench.baselines.environments import BASELINES, REQUIREMENTS
from vllm_dualpath.bench.comparison.baseline_runs import is_baseline
from vllm_dualpath.bench.comparison.machine import describe
from vllm_dualpath.bench.comparison.measures import Run, RunUse, hit_bytes, run_json
from vllm_dualpath.bench.comparison.settings import BASE_MODE, ComparisonPlan, Topology
from vllm_dualpath.bench.testbed.layout import TestbedSpec


@dataclass(frozen=True, slots=True)
class TopologyResult:
    """All runs on one topology, and what was measured besides."""

    topology: Topology
    spec: TestbedSpec
    runs: tuple[Run, ...]
    recompute_ttft_s: tuple[float, ...]
    unshaped_read_bytes_per_s: float
    failures: tuple[str, ...] = ()
    """Runs of baselines that came to nothing, and why."""

    def of(self, mode: str) -> list[Run]:
        """A mode's runs, by repeat."""
        return [run for run in self.runs if run.mode == mode]

    @property
    def modes(self) -> list[str]:
        """In the order in which they were given."""
        return list(dict.fromkeys(run.mode for run in self.runs))

    def ratios(self, mode: str) -> list[float]:
        """JCT of the base mode over the mode's, repeat by repeat. Runs with failed requests do
        not count: they did less.
        """
        base = {run.repeat: run.result.jct_s for run in self.of(BASE_MODE)}
        whole = [run for run in self.of(mode) if not run.result.num_failed]
        return [base[run.repeat] / run.result.jct_s for run in whole]

    def ratio(self, mode: str) -> float | None:
        """Their median; ``None`` if no run is whole."""
        return median(self.ratios(mode))

    def alone_ratio(self, mode: str) -> float | None:
        """TTFT of one request alone over the base mode's."""
        times, base = (
            [t for run in self.of(m) for t in run.alone_ttft_s] for m in (mode, BASE_MODE)
        )
        return statistics.median(times) / statistics.median(base) if times and base else None

    def bound(self) -> float | None:
        """What the ratio could be at most, for the share of the base mode's JCT in which the
        prefill nodes' storage NICs were busy: only that share gets faster.
        """
        shares = [
            RunUse(run, self.spec).prefill_read_share(run.whole) for run in self.of(BASE_MODE)
        ]
        known = [share for share in shares if share is not None]
        if not known:
            return None
        share = min(statistics.median(known), 1.0)
        return 1 / (1 - share + share / self.topology.ideal)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``bench cluster`` found."""

    plan: ComparisonPlan
    reference: Run | None
    topologies: tuple[TopologyResult, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for found in self.topologies for run in found.runs]

    @property
    def exact(self) -> bool:
        """Every answer of every run of ours is that of the reference; without one, of the first
        run.
        """
        return all_equal(
            [*self._reference, *(run for run in self.runs if not is_baseline(run.mode))]
        )

    @property
    def baselines_exact(self) -> bool | None:
        """The same of the baselines' runs; ``None`` without any."""
        foreign = [run for run in self.runs if is_baseline(run.mode)]
        return all_equal([*self._reference, *self.runs[:1], *foreign]) if foreign else None

    @property
    def _reference(self) -> list[Run]:
        return [self.reference] if self.reference else []


def all_equal(runs: Sequence[Run]) -> bool:
    """Whether no request failed and all answers are the same, token by token."""
    if not runs or any(run.result.num_failed for run in runs):
        return False
    expected = runs[0].answers()
    return all(run.answers() == expected for run in runs)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The report of ``bench cluster --json``."""
    return {
        "ratios": {
            str(found.topology): {mode: found.ratio(mode) for mode in found.modes}
            for found in comparison.topologies
        },
        "exact": comparison.exact,
        "baselines_exact": comparison.baselines_exact,
        "baselines": {
            name: str(REQUIREMENTS[name]) for name in BASELINES if name in comparison.plan.modes
        },
        "failures": [line for found in comparison.topologies for line in found.failures],
        "alone_ttft_ratios": {
            str(found.topology): {mode: found.alone_ratio(mode) for mode in found.modes}
            for found in comparison.topologies
        },
        "bounds": {str(found.topology): found.bound() for found in comparison.topologies},
        "regime": {
            str(found.topology): regime(comparison.plan, found) for found in comparison.topologies
        },
        "plan": plan_json(comparison.plan),
        "machine": describe(),
        "oracle": run_json(comparison.reference, None) if comparison.reference else None,
        "runs": [
            run_json(run, found.spec) for found in comparison.topologies for run in found.runs
        ],
    }


def plan_json(plan: ComparisonPlan) -> dict[str, Any]:
    """What was asked, and what follows from it."""
    return {
        **asdict(plan),
        "topologies": [str(topology) for topology in plan.topologies],
        "bytes_per_token": plan.bytes_per_token,
        "longest": plan.longest,
    }


def regime(plan: ComparisonPlan, found: TopologyResult) -> dict[str, float | None]:
    """Whether the figures mean what they are to mean; see docs/testbed.md."""
    base = found.of(BASE_MODE)
    ours = [run for run in found.runs if not is_baseline(run.mode)]
    uses = [RunUse(run, found.spec) for run in ours]
    base_uses = [RunUse(run, found.spec) for run in base]
    recompute_s = median(found.recompute_ttft_s)
    hit_s = median(time for run in base for time in run.alone_ttft_s)
    num_nics = found.topology.num_prefill + found.topology.num_decode
    rate = found.spec.storage_rate
    # Through one storage NIC at its full rate.
    read_s = plan.context * plan.bytes_per_token * 8 / rate if rate else None
    return {
        "kv_bytes_per_token": plan.bytes_per_token,
        "prefill_storage_nic_busy_steady": median(
            use.prefill_read_share(run.steady) for use, run in zip(base_uses, base, strict=True)
        ),
        "prefill_storage_nic_busy_whole": median(
            use.prefill_read_share(run.whole) for use, run in zip(base_uses, base, strict=True)
        ),
        "recompute_ttft_s": recompute_s,
        "hit_ttft_s": hit_s,
        "recompute_over_hit": recompute_s / hit_s if recompute_s and hit_s else None,
        "context_read_s": read_s,
        "recompute_over_read": recompute_s / read_s if recompute_s and read_s else None,
        "sum_of_storage_nics_bytes_per_s": rate * num_nics / 8 if rate else None,
        "unshaped_read_bytes_per_s": found.unshaped_read_bytes_per_s,
        # 1 or more: each byte of a hit crossed some storage NIC.
        "read_bytes_over_hit_bytes": median(
            use.read_bytes() / hit_bytes(plan, run) for use, run in zip(uses, ours, strict=True)
        ),
    }


def median(values: Iterable[float | None]) -> float | None:
    """Of what is there; ``None`` when nothing is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
