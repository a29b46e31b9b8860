"""What one mover does in one transfer, whichever it is: a side, or a donor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from vllm_dualpath.messages import CutDone, Peer, TransferFailed, TransferKey
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.reader import SegmentReader
from vllm_dualpath.mover.storage_queue import IoTask


class Part(ABC):
    """Owned by the loop's thread. Every public method is one event, or tells of the state."""

    def __init__(self, ports: Ports, key: TransferKey) -> None:
        self.key = key
        self.opened_s = ports.loop.now_s()
        self.stuck_warned = False
        self.closed = False
        self._ports = ports
        self._reader: SegmentReader | None = None
        self._limit = 0
        """Hit blocks still hoped for: the plan's, lowered by cuts."""
        self._cut_owed = False
        self._failed = False
        self._ending = False

    # --- events ----------------------------------------------------------------------------------

    @abstractmethod
    def on_cut(self, num_hit_blocks: int) -> None:
        """The hit ends earlier. Answered with ``CutDone`` when nothing beyond is under way."""

    @abstractmethod
    def on_end(self, drain: bool, *, staged: bool) -> None:
        """The router is done with this transfer. ``staged``: somebody was told to start."""

    def on_router_lost(self) -> None:
        """Nobody will say ``End`` any more."""
        self.on_end(drain=False, staged=True)

    @abstractmethod
    def on_stop_query(self, contact: Peer) -> None:
        """Another mover has ended the transfer and asks for proof that we write nothing more."""

    @abstractmethod
    def on_peer_dead(self, boot_id: bytes) -> None:
        """The process of one of ``peers`` is gone: it writes nothing more."""

    @abstractmethod
    def peer_lost(self, boot_id: bytes) -> None:
        """One of ``peers`` left the cluster or takes no data: no proof that it has stopped."""

    def on_stalled(self, stalled: Sequence[IoTask]) -> None:
        """These reads make no progress, perhaps some of this transfer's."""
        if self._reader is None or self._failed or self._ending:
            return
        if any(self._reader.owns(task) for task in stalled):
            self._reader.drop_stalled(stalled)
            self.fail("stalled")

    def fail(self, reason: str) -> None:
        """Tell the router, once, that this attempt cannot go on here."""
        if self._failed or self._ending or self.closed:
            return
        self._failed = True
        self._ports.counters.load_failures[reason] += 1
        self._ports.tell_router(TransferFailed(self.key, reason))

    # --- state -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def peers(self) -> tuple[Peer, ...]:
        """The other movers whose death matters."""

    @property
    def num_quarantined(self) -> int:
        """Slots it keeps only for want of proof that others have stopped to write."""
        return 0

    @property
    def waits_for_donor_slot(self) -> bool:
        return False

    def num_stuck_donor_slots(
        self,
        stalled: Collection[IoTask],  # noqa: ARG002 # a donor looks
        stalled_peers: Collection[bytes],  # noqa: ARG002
    ) -> int:
        """Donor slots it holds for a read or a push that makes no progress."""
        return 0

    @abstractmethod
    def describe(self) -> str:
        """For the log of a stuck transfer."""

    # --- for those that are one ------------------------------------------------------------------

    def _confirm_cut(self) -> None:
        if self._cut_owed and (self._reader is None or self._reader.is_quiet_from(self._limit)):
            self._cut_owed = False
            self._ports.tell_router(CutDone(self.key, self._limit))
