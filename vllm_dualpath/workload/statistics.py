"""The columns by which a trace is described, and the paper's three traces in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_dualpath.workload.trajectories import TrajectorySet


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """Every column is a mean over trajectories of the trajectory's own value.

    This reading is ours, and the only one we found in which the paper's columns agree: turns
    times (append + generated) is 1.6 to 1.7 times the total tokens, as it must be if short
    trajectories have long turns and the columns are averaged over trajectories, not turns.
    Source: the paper's Table 2.
    """

    max_len: int
    """No trajectory is longer than this many tokens."""
    turns: float
    append_tokens: float
    """Tokens appended a turn, the first turn's included."""
    generated_tokens: float
    """Tokens generated a turn."""
    total_tokens: float
    mean_context: float
    """Length of a turn's prompt."""


PAPER_TRACES = {
    "32k": TraceStatistics(32_768, 60, 608, 148, 28_639, 17_183),
    "48k": TraceStatistics(49_152, 106, 474, 172, 42_607, 25_120),
    "64k": TraceStatistics(65_536, 157, 429, 176, 55_958, 32_721),
}


def measure_statistics(trajectories: TrajectorySet) -> TraceStatistics:
    """What a trace's columns are; ``max_len`` is its longest trajectory."""
    turns, starts = trajectories.num_turns, trajectories.offsets[:-1]

    def mean_of_means(values: np.ndarray) -> float:
        return float(np.mean(np.add.reduceat(values.astype(np.int64), starts) / turns))

    totals = trajectories.total_tokens()
    return TraceStatistics(
        max_len=int(totals.max()),
        turns=float(np.mean(turns)),
        append_tokens=mean_of_means(trajectories.append_tokens),
        generated_tokens=mean_of_means(trajectories.generated_tokens),
        total_tokens=float(np.mean(totals)),
        mean_context=mean_of_means(trajectories.prompt_tokens()),
    )
