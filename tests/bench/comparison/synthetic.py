"""Runs with made-up counters, whose figures can be worked out by hand."""

from __future__ import annotations

from vllm_dualpath.bench.comparison.measures import Run
from vllm_dualpath.bench.comparison.record import TopologyResult
from vllm_dualpath.bench.comparison.samples import Sample, Timeline
from vllm_dualpath.bench.comparison.settings import CompareMode, Topology
from vllm_dualpath.bench.completion import Completion
from vllm_dualpath.bench.replay import ReplayResult, RequestRecord
from vllm_dualpath.bench.testbed.counters import Nic, NicBytes
from vllm_dualpath.bench.testbed.layout import NETWORKS, TestbedSpec

START_S = 1000.0
RATE = 800_000_000
"""Of each storage NIC: 100 MB a second."""
SPEC = TestbedSpec("t", 1, 1, RATE, None)
TOPOLOGY = Topology(1, 1)


def run(
    mode: CompareMode,
    jct_s: float,
    read_mb_per_s: dict[str, float],
    repeat: int = 0,
    token: int = 7,
) -> Run:
    """Two agents, three turns, requests at equal distances; NICs read at a constant rate."""
    step_s = jct_s / 3
    records = tuple(
        RequestRecord(agent, turn, tuple(range(130)), turn * step_s, Completion((token,), (0.5,)))
        for agent in range(2)
        for turn in range(3)
    )
    samples = [
        Sample(START_S + second, _nics(second, read_mb_per_s), 1.5 * second, 0.1 * second)
        for second in range(int(jct_s) + 2)
    ]
    result = ReplayResult(jct_s, records)
    return Run(TOPOLOGY, mode, repeat, result, START_S, (0.5,), Timeline(samples))


def _nics(second: int, read_mb_per_s: dict[str, float]) -> dict[Nic, NicBytes]:
    return {
        Nic(node.name, network): NicBytes(
            int(read_mb_per_s.get(node.name, 0) * 1e6 * second) if network == "storage" else 0, 0
        )
        for node in SPEC.engine_nodes()
        for network in NETWORKS
    }


def found(*runs: Run) -> TopologyResult:
    """These runs on one prefill and one decode node."""
    return TopologyResult(TOPOLOGY, SPEC, runs, (2.0,), 1e9)


PREFILL_ONLY = run("prefill_only", 12.0, {"prefill-0": 90.0})
SPLIT = run("split", 6.0, {"prefill-0": 90.0, "decode-0": 90.0})
