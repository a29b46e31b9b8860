"""What one simulation gave, and the numbers that are read off it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dualpath import native
from vllm_dualpath.sim.config import SimulationConfig

Seconds = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Summary:
    """Of the values there are; all 0 without any."""

    count: int
    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Seconds) -> Summary:
        """Entries that are NaN do not count."""
        there = values[~np.isnan(values)].astype(np.float64)
        if len(there) == 0:
            return cls(0, 0.0, 0.0, 0.0)
        middle, tail = np.quantile(there, [0.5, 0.99])
        return cls(len(there), float(there.mean()), float(middle), float(tail))

    def to_json(self) -> dict[str, float]:
        """As a JSON object."""
        return {"count": self.count, "mean": self.mean, "p50": self.p50, "p99": self.p99}


@dataclass(frozen=True, slots=True)
class NodeResult:
    """One node's storage NIC and staging memory."""

    role: str
    read_bytes: float
    written_bytes: float
    busy_s: float
    """Seconds in which at least one read was under way."""
    peak_staging_bytes: float
    window_bytes: npt.NDArray[np.float32]
    """Bytes read in each window of ``window_s``, from the start."""


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Times are simulated seconds. Arrays have one entry a measured turn."""

    config: SimulationConfig
    end_s: float
    job_s: float
    """Until the last token of the last agent: the paper's JCT of an offline run."""
    counts: dict[str, int]
    nodes: tuple[NodeResult, ...]
    agent_s: Seconds
    """From each finished agent's arrival to its last token."""
    first_token_s: Seconds
    second_token_s: Seconds
    per_token_s: Seconds
    staged_s: Seconds
    waiting_s: Seconds
    attention_balance: float
    """Slowest engine's attention over the mean engine's, in steps in which all have prompts."""
    window_s: float
    kv_bytes_per_token: int

    def storage_balance(self, window_s: float, from_s: float = 0.0) -> float:
        """Max/mean over storage NICs of the bytes read in windows of ``window_s``.

        Each window's ratio weighs as much as its traffic. 1.0 where nothing was read.
        """
        per_window = max(1, round(window_s / self.window_s))
        first = int(from_s / self.window_s)
        bytes_read = _windows(self.nodes, per_window, first)
        mean = bytes_read.mean(axis=0).sum()
        return float(bytes_read.max(axis=0).sum() / mean) if mean > 0 else 1.0

    def busy_share(self) -> tuple[float, ...]:
        """Each storage NIC's busy share of the run."""
        return tuple(node.busy_s / self.end_s if self.end_s else 0.0 for node in self.nodes)

    def meets(self, first_token_s: float, per_token_s: float) -> bool:
        """Whether mean TTFT and TPOT are within the objectives, and the load was carried.

        Agents wait for their answers, so an overloaded cluster has more and more of them: TTFT
        grows over the run, slowly enough for its mean to stay within the objective.
        """
        first, token = Summary.of(self.first_token_s), Summary.of(self.per_token_s)
        quarter = len(self.first_token_s) // 4
        if quarter == 0:
            return False
        early = Summary.of(self.first_token_s[: 2 * quarter]).mean
        late = Summary.of(self.first_token_s[-quarter:]).mean
        is_steady = late <= max(1.25 * early, early + 0.25)
        return is_steady and first.mean <= first_token_s and token.mean <= per_token_s

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays, with their summaries."""
        return {
            "config": self.config.model_dump(mode="json"),
            "end_s": self.end_s,
            "job_s": self.job_s,
            "counts": self.counts,
            "ttft_s": Summary.of(self.first_token_s).to_json(),
            "ttst_s": Summary.of(self.second_token_s).to_json(),
            "tpot_s": Summary.of(self.per_token_s).to_json(),
            "staged_s": Summary.of(self.staged_s).to_json(),
            "waiting_s": Summary.of(self.waiting_s).to_json(),
            "agent_s": Summary.of(self.agent_s).to_json(),
            "attention_max_over_mean": self.attention_balance,
            "storage_max_over_mean": {
                str(window): self.storage_balance(window) for window in (1.0, 10.0, 60.0)
            },
            "nodes": [
                {
                    "role": node.role,
                    "read_bytes": node.read_bytes,
                    "written_bytes": node.written_bytes,
                    "busy_share": share,
                    "peak_staging_bytes": node.peak_staging_bytes,
                }
                for node, share in zip(self.nodes, self.busy_share(), strict=True)
            ],
        }


def _windows(nodes: tuple[NodeResult, ...], per_window: int, first: int) -> npt.NDArray[np.float64]:
    """Bytes by node and by run of ``per_window`` windows."""
    length = max((len(node.window_bytes) for node in nodes), default=0)
    length = max(0, length - first)
    columns = max(1, -(-length // per_window))
    table = np.zeros((len(nodes), columns * per_window))
    for row, node in zip(table, nodes, strict=True):
        values = node.window_bytes[first:]
        row[: len(values)] = values
    summed: npt.NDArray[np.float64] = table.reshape(len(nodes), columns, per_window).sum(axis=2)
    return summed


def make_result(
    config: SimulationConfig, settings: native.SimSettings, raw: dict[str, Any]
) -> SimulationResult:
    """The core's answer as a result."""
    num_prefill = config.prefill_nodes
    nodes = tuple(
        NodeResult(role="prefill" if i < num_prefill else "decode", **node)
        for i, node in enumerate(raw["nodes"])
    )
    mean = raw["attention_mean_s"]
    agent_s = raw["agent_s"]
    return SimulationResult(
        config=config,
        end_s=raw["end_s"],
        job_s=raw["last_token_s"],
        counts=raw["counts"],
        nodes=nodes,
        agent_s=agent_s[agent_s >= 0],
        first_token_s=raw["first_token_s"],
        second_token_s=raw["second_token_s"],
        per_token_s=raw["per_token_s"],
        staged_s=raw["staged_s"],
        waiting_s=raw["waiting_s"],
        attention_balance=raw["attention_slowest_s"] / mean if mean > 0 else 1.0,
        window_s=settings.window_s,
        kv_bytes_per_token=settings.kv_bytes_per_token,
    )
