"""How two things are compared on a machine whose speed changes while one looks.

Both are measured in turn, time after time, in the order A B B A: what disturbs one disturbs the
other, and a drift favours neither. A ratio is taken within each round, and the median of the
ratios is the result, with a bootstrap confidence interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

_NUM_RESAMPLES = 2000
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the per-round ratios and its 95 % confidence interval."""

    median: float
    low: float
    high: float
    num_pairs: int

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def in_turn(items: Sequence[_T], round_idx: int) -> Sequence[_T]:
    """The order of one round: every other one backwards."""
    return items if round_idx % 2 == 0 else items[::-1]


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Of two samples taken in the same rounds. Raises ``ValueError`` unless they pair up.

    The resamples are drawn with a fixed seed: the same samples give the same interval.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"pairs: found {len(numerators)} and {len(denominators)} samples")
    ratios = np.asarray(numerators, dtype=float) / np.asarray(denominators, dtype=float)
    draws = np.random.default_rng(0).choice(ratios, size=(_NUM_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))
