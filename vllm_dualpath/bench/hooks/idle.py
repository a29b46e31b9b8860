"""What an engine with the connector loses against itself without it, with nothing to load or store.

Measured in a process of its own: one engine, whose connector is there for one batch in three.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vllm_dualpath.bench.hooks.timing_process import run_timing
from vllm_dualpath.bench.mover.pairing import Ratio, paired_ratio
from vllm_dualpath.bench.tiny_model import TinyModel, write_tiny_model

MODEL = TinyModel(layers=8, hidden=256, heads=8, kv_heads=4, head_dim=32, dtype="bfloat16")
_MODULE = "vllm_dualpath.connector.idle_timing"
_START_S = 120.0
_ROUND_S = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    """One batch: requests that run together, with prompts nobody saw before."""

    num_requests: int = 8
    prompt_tokens: int = 96
    output_tokens: int = 6


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

    def ratios(self) -> dict[str, Ratio]:
        """Time and CPU time of a batch with the connector, by those without it."""
        ours, plain, empty = self.connector, self.plain, self.empty
        return {
            "idle_vs_plain": paired_ratio([b.seconds for b in ours], [b.seconds for b in plain]),
            "idle_cpu_vs_plain": paired_ratio([b.cpu_s for b in ours], [b.cpu_s for b in plain]),
            "idle_cpu_vs_empty": paired_ratio([b.cpu_s for b in ours], [b.cpu_s for b in empty]),
        }


def measure_idle(num_rounds: int, load: Load | None = None) -> IdleOverhead:
    """Run ``num_rounds`` batches with and without. Raises ``LaunchError``.

    The engine runs on the last core this process may use: a second thread would be noise.
    """
    load = load or Load()
    with tempfile.TemporaryDirectory(prefix="dualpath-idle-model-") as name:
        model = Path(name) / "model"
        write_tiny_model(MODEL, model)
        arguments = [
            *("--model", str(model), "--rounds", str(num_rounds), "--batch"),
            *map(str, (load.num_requests, load.prompt_tokens, load.output_tokens)),
            *("--core", str(max(os.sched_getaffinity(0)))),
        ]
        costs = run_timing("idle timing", _MODULE, arguments, _START_S + _ROUND_S * num_rounds)
    kinds = {kind: tuple(BatchCost(**each) for each in batches) for kind, batches in costs.items()}
    return IdleOverhead(**kinds)
