"""One transfer at one mover: what both sides share, above all its end.

Slots are freed only when nobody can touch them any more. ``docs/protocol.md`` has the rules;
``_advance`` is the one place that applies them, called after every event.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

from vllm_dualpath.errors import ProtocolError, StagingFull
from vllm_dualpath.messages import (
    BlocksGood,
    CutDone,
    Ended,
    PagesGood,
    Peer,
    Reserve,
    Stage,
    StopQuery,
    TransferFailed,
    WriterStopped,
)
from vllm_dualpath.mover.peers import PutOutcome
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.reader import SegmentReader
from vllm_dualpath.mover.storage_queue import IoTask

logger = logging.getLogger(__name__)


class Transfer(ABC):
    """Owned by the loop's thread. Every public method is one event."""

    def __init__(self, ports: Ports, reserve: Reserve, slots: tuple[int, ...]) -> None:
        self.key = reserve.key
        self.peer: Peer = reserve.peer
        self.opened_s = ports.loop.now_s()
        self.stuck_warned = False
        self._ports = ports
        self._num_tokens = reserve.num_tokens
        self._slots = slots
        self._stage: Stage | None = None
        self._reader: SegmentReader | None = None
        self._limit = 0
        """Hit blocks still hoped for: the plan's, lowered by cuts."""
        self._early_notices: list[BlocksGood | PagesGood] = []
        self._entry: int | None = None
        self._num_releases = 0
        self._open_puts = 0
        self._open_stores = 0
        self._failed = False
        self._ending = False
        self._drain = False
        self._told_peer = False
        self._writes_ambiguous = False
        """A put failed under way: nothing we say now proves that its bytes do not arrive later."""
        self._peer_stopped = False
        self._uncertain = False
        """No ``Stage`` came before the end, but the peer may have been told: the router is lost, or
        says that it sent one.
        """
        self._cut_owed = False
        self.closed = False

    # --- events from the router ------------------------------------------------------------------

    def on_stage(self, stage: Stage) -> None:
        """Start reading the own segments."""
        if self._stage is not None or self._ending:
            return
        self._stage = stage
        self.peer = stage.peer
        self._limit = stage.num_hit_blocks
        self._staged()
        for notice in self._early_notices:
            self.on_notice(notice)
        self._early_notices.clear()
        own = [segment for segment in stage.segments if segment.reader == self._ports.engine_id]
        if own:
            self._reader = SegmentReader(
                self._ports,
                self.key,
                own,
                stage.block_hashes,
                self._slots,
                stage.peer,
                on_good=self._block_good,
                on_quiet=self._progress,
                on_push_failed=self._push_failed,
            )
            self._reader.start()
        self._progress()

    def on_cut(self, num_hit_blocks: int) -> None:
        """The hit ends earlier. Answered with ``CutDone`` when nothing beyond is under way."""
        if self._stage is None or self._ending or self._entry is not None:
            return
        self._limit = min(self._limit, num_hit_blocks)
        if self._reader is not None:
            self._reader.cut(self._limit)
        self._cut()
        self._cut_owed = True
        self._progress()

    def on_end(self, drain: bool, *, staged: bool) -> None:
        """The router is done with this transfer. ``staged``: a ``Stage`` was sent to somebody."""
        if self._ending and (drain or not self._drain):
            return
        self._uncertain |= staged and self._stage is None
        self._ending = True
        self._drain = drain
        if self._reader is not None:
            # Once published all is read; what is still being pushed while we drain is not bad.
            keep = drain and self._entry is not None
            self._reader.cut(self._limit if keep else 0)
        self._advance()

    def on_router_lost(self) -> None:
        """Nobody will say ``End`` any more."""
        self.on_end(drain=False, staged=True)

    # --- events from the engine ------------------------------------------------------------------

    def on_release(self) -> None:
        """One claim of the slots is over. Raises ``ProtocolError`` if none is open."""
        if self._entry is None or self._num_releases >= self._ports.table.num_claims(self._entry):
            raise ProtocolError(f"transfer {self.key}: release without a claim")
        self._num_releases += 1
        self._advance()

    # --- events from the peer --------------------------------------------------------------------

    def on_notice(self, notice: BlocksGood | PagesGood) -> None:
        """The peer wrote into our slots. What is out of range is rejected and counted."""
        if self._stage is None:
            self._keep_early(notice)
        elif isinstance(notice, BlocksGood):
            for block in range(notice.first_block, min(notice.last_block, self._limit)):
                self._mark_block(block)
            self._progress()
        else:
            self._mark_pages(notice)
            self._progress()

    def on_writer_stopped(self) -> None:
        """Proof that the peer writes nothing more."""
        self._peer_stopped = True
        self._advance()

    def on_stop_query(self, contact: Peer) -> None:
        """The peer asks for that proof; its asking is its own."""
        self.peer = self.peer if self._stage is not None else contact
        self._peer_stopped = True
        self._told_peer = False
        self._advance()

    def on_peer_dead(self) -> None:
        """The peer's process is gone: it writes nothing more."""
        self._peer_stopped = True
        self.peer_lost()
        self._advance()

    def peer_lost(self) -> None:
        """The peer left the cluster or takes no data, which does not prove that it has stopped."""
        if self._needs_peer():
            self.fail("peer_lost")

    # --- state -----------------------------------------------------------------------------------

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots it holds."""
        return self._slots

    @property
    def awaits_proof(self) -> bool:
        """Over but for the proof that the peer has stopped: its slots are in quarantine."""
        return self._ending and not self.closed and self._peer_may_write() and self._own_done()

    def on_stalled(self, stalled: Sequence[IoTask]) -> None:
        """These reads make no progress, perhaps some of this transfer's."""
        if self._reader is None or self._failed or self._ending:
            return
        if any(self._reader.owns(task) for task in stalled):
            self._reader.drop_stalled(stalled)
            self.fail("stalled")

    def fail(self, reason: str) -> None:
        """Tell the router, once, that this attempt cannot go on here."""
        if self._failed or self._ending:
            return
        self._failed = True
        self._ports.counters.load_failures[reason] += 1
        self._ports.tell_router(TransferFailed(self.key, reason))

    def describe(self) -> str:
        """For the log of a stuck transfer."""
        return (
            f"transfer {self.key} ({self._ports.pool.name}): staged={self._stage is not None}"
            f" published={self._entry is not None} ending={self._ending}"
            f" releases={self._num_releases} open puts={self._open_puts}"
            f" stores={self._open_stores} peer stopped={self._peer_stopped}"
        )

    # --- for the two sides -----------------------------------------------------------------------

    @abstractmethod
    def _staged(self) -> None:
        """``Stage`` has come."""

    @abstractmethod
    def _mark_block(self, block: int) -> None:
        """A hit block is good in our slots."""

    @abstractmethod
    def _mark_pages(self, notice: PagesGood) -> None:
        """Pages that the peer's engine computed are good in our slots."""

    @abstractmethod
    def _cut(self) -> None:
        """``_limit`` was lowered."""

    @abstractmethod
    def _check_good(self) -> None:
        """Publish if everything is there."""

    @abstractmethod
    def _needs_peer(self) -> bool:
        """Whether the transfer cannot do its work without the peer from here on."""

    @abstractmethod
    def _peer_writes(self) -> bool:
        """Whether the plan lets the peer write to our slots, and it may not have finished."""

    def _complete(self) -> bool:
        """Whether the slots can be freed before the router says ``End``."""
        return False

    def _publish(self, num_hit_blocks: int) -> bool:
        assert self._stage is not None
        try:
            self._entry = self._ports.table.publish(
                self.key, num_hit_blocks, self._num_tokens, self._stage.digest, self._slots
            )
        except StagingFull as exc:
            logger.warning("transfer %s: %s", self.key, exc)
            self.fail("table_full")
            return False
        return True

    def _block_good(self, block: int) -> None:
        if block < self._limit:
            self._mark_block(block)

    def _progress(self) -> None:
        """Something was read, pushed, received or cut."""
        if self._cut_owed and (self._reader is None or self._reader.is_quiet_from(self._limit)):
            self._cut_owed = False
            self._ports.tell_router(CutDone(self.key, self._limit))
        over = self._ending or self._failed
        if not over and self._entry is None and self._stage is not None:
            self._check_good()
        self._advance()

    def _push_failed(self, outcome: PutOutcome) -> None:
        self._writes_ambiguous |= outcome is PutOutcome.AMBIGUOUS
        self.fail("peer_lost")

    def _keep_early(self, notice: BlocksGood | PagesGood) -> None:
        # The peer may be staged before us and finish first; a notice names at least one page.
        geometry = self._ports.geometry
        if len(self._early_notices) < geometry.num_layers * geometry.num_pages(self._num_tokens):
            self._early_notices.append(notice)
        else:
            self._ports.counters.rejected_messages += 1

    def _advance(self) -> None:
        if self.closed or not (self._ending or self._complete()):
            return
        retired = self._entry is None or self._ports.table.retire(self._entry, self._num_releases)
        if self._own_writes_done() and (retired or not self._drain):
            self._tell_peer()
        if not retired or not self._own_done() or self._peer_may_write():
            return
        self._close()

    def _own_writes_done(self) -> bool:
        return self._open_puts == 0 and (self._reader is None or self._reader.is_done)

    def _own_done(self) -> bool:
        return self._own_writes_done() and self._open_stores == 0

    def _peer_may_write(self) -> bool:
        if self._peer_stopped:
            return False
        return self._uncertain if self._stage is None else self._peer_writes()

    def _tell_peer(self) -> None:
        """Say that we write nothing more.

        Also when we never learnt of a ``Stage``: the peer's may have come, and it waits for us.
        """
        if self._told_peer or self._writes_ambiguous:
            return
        self._told_peer = True
        if self._uncertain and not self._peer_stopped:
            notice: WriterStopped | StopQuery = StopQuery(
                self.key, self.peer.boot_id, self._ports.contact
            )
        else:
            notice = WriterStopped(self.key, self.peer.boot_id)
        self._ports.peers.notify(self.peer, notice)

    def _close(self) -> None:
        self.closed = True
        if self._entry is not None:
            self._ports.table.free(self._entry)
        self._ports.pool.release(self._slots)
        self._ports.tell_router(Ended(self.key))
        self._ports.closed(self.key)
