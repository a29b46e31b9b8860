"""Mean and percentiles of latencies, as a replay reports them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one latency, in seconds; ``nan``-free: an empty sample has no summary."""

    mean: float
    p50: float
    p99: float

    def to_json(self) -> dict[str, float]:
        """Plain types."""
        return asdict(self)


def percentile(ordered: list[float], share: float) -> float:
    """Nearest-rank percentile of a sorted, non-empty sample: always one of its values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarize(values: Iterable[float | None]) -> Summary | None:
    """The summary of what is there; ``None`` when nothing is."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    return Summary(
        sum(ordered) / len(ordered), percentile(ordered, 0.50), percentile(ordered, 0.99)
    )
