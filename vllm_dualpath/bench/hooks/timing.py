"""What the connector's hooks cost, step by step, measured in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dualpath.bench.hooks.timing_process import run_timing

PAGE_COUNTS = (16, 512, 4096, 16384)
LIMIT_US = 50.0
"""What the hooks may take of vLLM's thread, a layer and step."""

_MODULE = "vllm_dualpath.connector.hook_timing"
_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Steps that load ``num_pages`` pages in every layer; medians, in microseconds."""

    num_pages: int
    cpu_us: float
    """CPU time of vLLM's thread in all hooks of a step, by the number of layers."""
    waited_us: float
    """How long hooks blocked, by the number of layers, where no forward pass hides the copies."""
    bare_cpu_us: float
    """Their CPU time then: they wait, and share caches and memory bus with the copies."""
    hooks: dict[str, dict[str, float]]
    """Of one call of each hook: ``cpu_us`` and ``wall_us``."""

    @classmethod
    def parse(cls, num_pages: str, values: dict[str, Any]) -> StepTiming:
        """From what the timing process writes of one size."""
        return cls(
            int(num_pages),
            values["cpu_us_a_layer"],
            values["waited_us_a_layer"],
            values["bare_cpu_us_a_layer"],
            values["hooks"],
        )


def time_hooks(num_steps: int, page_counts: Sequence[int] = PAGE_COUNTS) -> list[StepTiming]:
    """Measure ``num_steps`` steps of each size. Raises ``LaunchError``."""
    arguments = ["--steps", str(num_steps), "--pages", *map(str, page_counts)]
    one_thread = {"OMP_NUM_THREADS": "1"}
    pages = run_timing("timing the hooks", _MODULE, arguments, _TIMEOUT_S, one_thread)["pages"]
    return [StepTiming.parse(count, values) for count, values in pages.items()]
