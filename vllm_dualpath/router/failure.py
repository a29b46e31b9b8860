"""Where an attempt of a transfer is, and why one is over."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PEER_LOST = "peer_lost"
EVICTED = "evicted"
"""What the plan left to the prefill engine's own cache is there no more."""


class State(Enum):
    """Where the attempt is; the order is the order of the good case."""

    RESERVING_DECODE = "reserving decode slots"
    RESERVING_PREFILL = "reserving prefill slots"
    STAGING = "staging"
    READY = "ready, prefill leg"
    COMMITTED = "committed, decode leg"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt is over, and whose fault it is where that is known."""

    reason: str
    engine_id: str
    during: State

    @property
    def label(self) -> str:
        """The reason as a metric's label: of a small, fixed set."""
        own = self.reason in (PEER_LOST, EVICTED)
        return self.reason if own else self.during.name.lower()

    @property
    def worth_another(self) -> bool:
        """Whether another plan may do better: slots are lacking whoever reads."""
        reserving = self.during in (State.RESERVING_DECODE, State.RESERVING_PREFILL)
        return self.reason == PEER_LOST or not reserving
