"""A mover that reads for a transfer between two others: blocks pass through its donor slots.

Nobody else writes to what it holds, so its end is simple: when nothing is read or pushed any more
it tells both targets and the router, and is gone.
"""

from __future__ import annotations

from collections.abc import Collection

from vllm_dualpath.messages import Donate, Ended, Peer, TransferFailed, WriterStopped
from vllm_dualpath.mover.part import Part
from vllm_dualpath.mover.peers import PutOutcome
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.reader import SegmentReader, Target
from vllm_dualpath.mover.slot_sources import DonorWindow
from vllm_dualpath.mover.storage_queue import IoTask


class DonorTransfer(Part):
    """Owned by the loop's thread. ``start`` once it is in the book: it may be over at once."""

    def __init__(self, ports: Ports, donate: Donate) -> None:
        super().__init__(ports, donate.key)
        self._targets = (Target(donate.prefill, "prefill"), Target(donate.decode, "decode"))
        self._limit = len(donate.decode.slots)  # cuts concern all, also those beyond our own part
        self._told: set[bytes] = set()
        """Targets that know that nothing more comes."""
        self._unproven: set[bytes] = set()
        """Targets to which a put failed under way: its bytes may arrive later than any notice."""
        self._donated = SegmentReader(
            ports,
            self.key,
            donate.segments,
            donate.block_hashes,
            DonorWindow(ports.donor_pool),
            self._targets,
            on_good=_nothing,
            on_quiet=self._progress,
            on_push_failed=self._push_failed,
            donated=True,
        )
        self._reader = self._donated

    def start(self) -> None:
        self._donated.start()

    # --- events ----------------------------------------------------------------------------------

    def on_cut(self, num_hit_blocks: int) -> None:
        if self._ending:
            return
        self._limit = min(self._limit, num_hit_blocks)
        self._cut_owed = True
        self._donated.cut(self._limit)
        self._progress()

    def on_end(self, drain: bool, *, staged: bool) -> None:  # noqa: ARG002 # nothing to drain
        self._ending = True
        self._donated.cut(0)
        self._progress()

    def on_stop_query(self, contact: Peer) -> None:  # noqa: ARG002 # both are told at the end
        self.on_end(drain=False, staged=True)

    def on_peer_dead(self, boot_id: bytes) -> None:
        self.peer_lost(boot_id)

    def peer_lost(self, boot_id: bytes) -> None:
        if any(peer.boot_id == boot_id for peer in self.peers):
            self.fail("peer_lost")

    # --- state -----------------------------------------------------------------------------------

    @property
    def peers(self) -> tuple[Peer, ...]:
        return tuple(target.peer for target in self._targets)

    @property
    def waits_for_donor_slot(self) -> bool:
        return self._donated.waits_for_slot

    def num_stuck_donor_slots(
        self, stalled: Collection[IoTask], stalled_peers: Collection[bytes]
    ) -> int:
        return self._donated.num_stuck(stalled, stalled_peers)

    def describe(self) -> str:
        return (
            f"transfer {self.key} (donor): ending={self._ending} open blocks="
            f"{self._donated.num_open} waits for a slot={self._donated.waits_for_slot}"
        )

    # --- inner parts -----------------------------------------------------------------------------

    def _push_failed(self, peer: Peer, outcome: PutOutcome) -> None:
        if outcome is PutOutcome.AMBIGUOUS:
            self._unproven.add(peer.boot_id)
        self.fail("peer_lost")

    def _progress(self) -> None:
        """Something was read, pushed or cut."""
        if self.closed:
            return
        if not self._failed:
            self._confirm_cut()
        for peer in self.peers:
            if peer.boot_id not in self._told and self._donated.is_done_with(peer.boot_id):
                self._tell(peer)
        if self._donated.is_done:
            self._close()

    def _tell(self, peer: Peer) -> None:
        """As soon as nothing more can come to a target: the other one, or a read, may hang."""
        self._told.add(peer.boot_id)
        if peer.boot_id not in self._unproven:
            notice = WriterStopped(self.key, peer.boot_id, self._ports.boot_id)
            self._ports.peers.notify(peer, notice)

    def _close(self) -> None:
        self.closed = True
        if self._unproven:
            # Said before, perhaps to nobody; whoever hears this does not go on.
            self._ports.tell_router(TransferFailed(self.key, "peer_lost"))
        self._ports.tell_router(Ended(self.key))
        self._ports.closed(self.key, frozenset(self._unproven))


def _nothing(_block: int) -> None:
    """The targets hear of a good block, nobody here has to."""
