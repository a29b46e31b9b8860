"""How long each part of the benchmark may measure, and who is told how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """Rounds until ``seconds`` are over, but at least and at most so many.

    The number of rounds follows the machine's speed, the time does not: a slow machine gets a
    wider interval, not a benchmark that never ends.
    """

    seconds: float
    at_least: int = 3
    at_most: int = 30

    def rounds(self, tick: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Round numbers; ``tick`` is called after each round."""
        start = time.monotonic()
        for round_idx in range(self.at_most):
            if round_idx >= self.at_least and time.monotonic() - start >= self.seconds:
                return
            yield round_idx
            tick()
