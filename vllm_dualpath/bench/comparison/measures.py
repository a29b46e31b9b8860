"""One run's figures: times of its requests, use of its NICs, CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_dualpath.bench.comparison.samples import Timeline, Window
from vllm_dualpath.bench.comparison.settings import (
    BLOCK_TOKENS,
    CompareMode,
    ComparisonPlan,
    Topology,
)
from vllm_dualpath.bench.replay import ReplayResult
from vllm_dualpath.bench.testbed.counters import Nic
from vllm_dualpath.bench.testbed.layout import NETWORKS, Network, TestbedSpec

_BITS = 8


@dataclass(frozen=True, slots=True)
class NicUse:
    """What one engine node's NIC did in a run."""

    nic: Nic
    received_bytes: float
    sent_bytes: float
    steady_share: float | None
    """Of its rate, in the steady part, in its busier direction; ``None`` where not shaped."""
    series: list[tuple[float, float, float]]
    """Second of the run, megabytes a second received and sent since the point before."""


@dataclass(frozen=True, slots=True)
class Run:
    """One mode's replay on one topology."""

    topology: Topology
    mode: CompareMode
    repeat: int
    result: ReplayResult
    start_s: float
    """On the sampler's clock."""
    alone_ttft_s: tuple[float, ...] = ()
    """Of requests on the idle cluster, before."""
    timeline: Timeline | None = None
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    """By kind of process; all of the testbed's."""

    @property
    def whole(self) -> Window:
        return Window(self.start_s, self.start_s + self.result.jct_s)

    @property
    def steady(self) -> Window:
        """From the second turn's first request to the last turn's first."""
        last_turn = max(record.turn for record in self.result.records)
        first = self._first_start_s(min(1, last_turn))
        return Window(self.start_s + first, self.start_s + self._first_start_s(last_turn))

    def _first_start_s(self, turn: int) -> float:
        return min(record.start_s for record in self.result.records if record.turn == turn)

    def answers(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Tokens by agent and turn; a request that failed has none."""
        return {
            (record.agent, record.turn): record.completion.token_ids if record.completion else ()
            for record in self.result.records
        }


class RunUse:
    """How a run used the NICs of the engine nodes."""

    def __init__(self, run: Run, spec: TestbedSpec) -> None:
        assert run.timeline is not None, "this run was sampled"
        self._run = run
        self._spec = spec
        self._timeline = run.timeline

    def nics(self, network: Network) -> list[NicUse]:
        """Each engine node's NIC of a network."""
        return [
            self._use(Nic(node.name, network), self._spec.rate(network))
            for node in self._spec.engine_nodes()
        ]

    def _use(self, nic: Nic, rate: int | None) -> NicUse:
        whole, steady = self._run.whole, self._run.steady
        received, sent = self._timeline.received, self._timeline.sent
        share = None
        if rate is not None and steady.length_s > 0:
            busier = max(received(steady, nic), sent(steady, nic))
            share = busier * _BITS / (rate * steady.length_s)
        return NicUse(nic, received(whole, nic), sent(whole, nic), share, self._series(nic))

    def _series(self, nic: Nic) -> list[tuple[float, float, float]]:
        series = []
        for before, after in zip(self._timeline.samples, self._timeline.samples[1:], strict=False):
            window = Window(before.at_s, after.at_s)
            if window.length_s <= 0:
                continue
            scale = 1e-6 / window.length_s
            received = self._timeline.received(window, nic) * scale
            sent = self._timeline.sent(window, nic) * scale
            series.append((after.at_s - self._run.start_s, received, sent))
        return series

    def steady_read_share(self) -> float | None:
        """Bytes read over what all storage NICs together could have read, in the steady part."""
        rate, steady = self._spec.storage_rate, self._run.steady
        if rate is None or steady.length_s <= 0:
            return None
        nics = [Nic(node.name, "storage") for node in self._spec.engine_nodes()]
        read = sum(self._timeline.received(steady, nic) for nic in nics)
        return read * _BITS / (rate * len(nics) * steady.length_s)

    def prefill_read_share(self, window: Window) -> float | None:
        """The same for the prefill nodes' storage NICs, in any window."""
        rate = self._spec.storage_rate
        if rate is None or window.length_s <= 0:
            return None
        nics = [
            Nic(node.name, "storage")
            for node in self._spec.engine_nodes()
            if node.name.startswith("prefill")
        ]
        read = sum(self._timeline.received(window, nic) for nic in nics)
        return read * _BITS / (rate * len(nics) * window.length_s)

    def balance(self) -> float:
        """Most bytes read through one storage NIC over the mean of all: 1 is perfect."""
        read = [use.received_bytes for use in self.nics("storage")]
        return max(read) * len(read) / max(sum(read), 1.0)

    def read_bytes(self) -> float:
        """Bytes that all engine nodes received from the store."""
        return sum(use.received_bytes for use in self.nics("storage"))

    def cpu_busy_cores(self) -> tuple[float, float]:
        """Cores busy on average, and taken by the hypervisor, on the whole machine."""
        whole = self._run.whole
        busy = self._timeline.growth(whole, lambda sample: sample.cpu_busy_s)
        steal = self._timeline.growth(whole, lambda sample: sample.cpu_steal_s)
        return busy / whole.length_s, steal / whole.length_s


def hit_bytes(plan: ComparisonPlan, run: Run) -> int:
    """Payload that the run's prompts have in the store: full blocks, less the last token's."""
    blocks = sum((len(record.prompt) - 1) // BLOCK_TOKENS for record in run.result.records)
    return blocks * BLOCK_TOKENS * plan.bytes_per_token


def run_json(run: Run, spec: TestbedSpec | None) -> dict[str, Any]:
    """Plain types; NIC figures only for a run on the testbed."""
    record: dict[str, Any] = {
        "topology": str(run.topology),
        "mode": run.mode,
        "repeat": run.repeat,
        "alone_ttft_s": list(run.alone_ttft_s),
        **run.result.to_json(),
    }
    if run.timeline is None or spec is None:
        return record
    use = RunUse(run, spec)
    busy, steal = use.cpu_busy_cores()
    record |= {
        "steady_s": [run.steady.start_s - run.start_s, run.steady.end_s - run.start_s],
        "steady_read_share": use.steady_read_share(),
        "prefill_steady_read_share": use.prefill_read_share(run.steady),
        "prefill_whole_read_share": use.prefill_read_share(run.whole),
        "storage_read_bytes": use.read_bytes(),
        "storage_balance": use.balance(),
        "cpu_busy_cores": busy,
        "cpu_steal_cores": steal,
        "cpu_s": dict(run.cpu_s),
        "nics": [
            {
                "node": nic.nic.node,
                "network": nic.nic.network,
                "received_bytes": nic.received_bytes,
                "sent_bytes": nic.sent_bytes,
                "steady_share": nic.steady_share,
                "series_s_mbps_in_out": [[round(x, 3) for x in point] for point in nic.series],
            }
            for network in NETWORKS
            for nic in use.nics(network)
        ],
    }
    return record
