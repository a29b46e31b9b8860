"""What an engine with the connector loses against itself without it, with nothing to load or store.

Measured in a process of its own: one engine, whose connector is there for one batch in three. What
vLLM and the connector add is so much a step and a layer, so the share depends on the model.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vllm_dualpath.bench.hooks.timing_process import run_timing
from vllm_dualpath.bench.mover.pairing import Ratio, paired_ratio
from vllm_dualpath.bench.tiny_model import TinyModel, write_tiny_model

_MODULE = "vllm_dualpath.connector.idle_timing"
_START_S = 240.0


@dataclass(frozen=True, slots=True)
class IdleCase:
    """A model and one batch for it: requests that run together, with prompts nobody saw before."""

    model: TinyModel
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    num_rounds: int
    num_short_rounds: int
    round_s: float
    """More than three batches ever take."""


SERVED = IdleCase(
    TinyModel("qwen3", 28, hidden=1024, heads=16, kv_heads=8, head_dim=128, dtype="bfloat16"),
    num_requests=4,
    prompt_tokens=64,
    output_tokens=12,
    num_rounds=60,
    num_short_rounds=10,
    round_s=30.0,
)
"""The depth and width of Qwen3-0.6B, about the smallest model that is served, on one core."""
TINY = IdleCase(
    TinyModel(layers=8, hidden=256, heads=8, kv_heads=4, head_dim=32, dtype="bfloat16"),
    num_requests=8,
    prompt_tokens=96,
    output_tokens=6,
    num_rounds=700,
    num_short_rounds=60,
    round_s=2.0,
)
"""So little to compute that what vLLM does for any connector shows."""
CASES = {"served": SERVED, "tiny": TINY}


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What one batch took, and what CPU time of all threads of the engine."""

    seconds: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class IdleOverhead:
    """Batches of three kinds, round by round."""

    plain: tuple[BatchCost, ...]
    empty: tuple[BatchCost, ...]
    """With a connector that does nothing: what vLLM does for any."""
    connector: tuple[BatchCost, ...]

    @property
    def batch_s(self) -> float:
        """What a batch of plain vLLM took, the median."""
        return statistics.median(batch.seconds for batch in self.plain)

    def ratios(self) -> dict[str, Ratio]:
        """Time and CPU time of a batch with the connector, by those without it."""
        ours, plain, empty = self.connector, self.plain, self.empty
        return {
            "idle_vs_plain": paired_ratio([b.seconds for b in ours], [b.seconds for b in plain]),
            "idle_cpu_vs_plain": paired_ratio([b.cpu_s for b in ours], [b.cpu_s for b in plain]),
            "idle_cpu_vs_empty": paired_ratio([b.cpu_s for b in ours], [b.cpu_s for b in empty]),
        }


def measure_idle(case: IdleCase, num_rounds: int) -> IdleOverhead:
    """Run ``num_rounds`` batches with and without. Raises ``LaunchError``.

    The engine runs on the last core this process may use: a second thread would be noise.
    """
    with tempfile.TemporaryDirectory(prefix="dualpath-idle-model-") as name:
        model = Path(name) / "model"
        write_tiny_model(case.model, model)
        arguments = [
            *("--model", str(model), "--rounds", str(num_rounds), "--batch"),
            *map(str, (case.num_requests, case.prompt_tokens, case.output_tokens)),
            *("--core", str(max(os.sched_getaffinity(0)))),
        ]
        timeout_s = _START_S + case.round_s * num_rounds
        costs = run_timing("idle timing", _MODULE, arguments, timeout_s)
    kinds = {kind: tuple(BatchCost(**each) for each in batches) for kind, batches in costs.items()}
    return IdleOverhead(**kinds)
