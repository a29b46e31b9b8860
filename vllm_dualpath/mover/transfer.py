"""One transfer at one mover: what both sides share, above all its end.

Slots are freed only when nobody can touch them any more. ``docs/protocol.md`` has the rules;
``_advance`` is the one place that applies them, called after every event.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence

from vllm_dualpath.errors import ProtocolError, StagingFull
from vllm_dualpath.messages import (
    BlocksGood,
    Ended,
    PagesGood,
    Peer,
    Reserve,
    SegmentSpec,
    Stage,
    StopQuery,
    WriterStopped,
)
from vllm_dualpath.mover.part import Part
from vllm_dualpath.mover.peers import PutOutcome
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.reader import SegmentReader, Target
from vllm_dualpath.mover.slot_sources import OwnSlots

logger = logging.getLogger(__name__)


class Transfer(Part):
    """A side: it holds slots for the whole prompt, and others write to them."""

    def __init__(self, ports: Ports, reserve: Reserve, slots: tuple[int, ...]) -> None:
        super().__init__(ports, reserve.key)
        self.peer: Peer = reserve.peer
        self.donors = reserve.donors
        self._num_tokens = reserve.num_tokens
        self._slots = slots
        self._stage: Stage | None = None
        self._early_notices: list[BlocksGood | PagesGood] = []
        self._entry: int | None = None
        self._num_releases = 0
        self._open_puts = 0
        self._open_stores = 0
        self._drain = False
        self._told_peer = False
        self._asked_by: Peer | None = None
        """The peer as it named itself when it asked for our proof."""
        self._writes_ambiguous = False
        """A put failed under way: nothing we say now proves that its bytes do not arrive later."""
        self._stopped: set[bytes] = set()
        """Boot ids of those who are proven to write nothing more."""
        self._asked: set[bytes] = set()
        """Donors asked for that proof."""
        self._uncertain = False
        """No ``Stage`` came before the end, but the others may have been told: the router is lost,
        or says that it sent one.
        """

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
                OwnSlots(self._slots),
                (Target(stage.peer, self._peer_role),),
                on_good=self._block_good,
                on_quiet=self._progress,
                on_push_failed=self._push_failed,
            )
            self._reader.start()
        self._progress()

    def on_cut(self, num_hit_blocks: int) -> None:
        if self._stage is None or self._ending or self._entry is not None:
            return
        self._limit = min(self._limit, max(num_hit_blocks, self._num_cached_blocks))
        if self._reader is not None:
            self._reader.cut(self._limit)
        self._cut()
        self._cut_owed = True
        self._progress()

    def on_end(self, drain: bool, *, staged: bool) -> None:
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
            first = max(notice.first_block, self._num_cached_blocks)
            for block in range(first, min(notice.last_block, self._limit)):
                self._mark_block(block)
            self._progress()
        else:
            self._mark_pages(notice)
            self._progress()

    def on_writer_stopped(self, boot_id: bytes) -> None:
        """Proof that the peer or a donor writes nothing more."""
        self._stopped.add(boot_id)
        self._advance()

    def on_stop_query(self, contact: Peer) -> None:
        # The peer's asking is its own proof, and it says itself how to reach it.
        self.peer = self.peer if self._stage is not None else contact
        self._asked_by = contact
        self._stopped.add(self.peer.boot_id)
        self._told_peer = False
        self._advance()

    def on_peer_dead(self, boot_id: bytes) -> None:
        self._stopped.add(boot_id)
        self.peer_lost(boot_id)
        self._advance()

    def peer_lost(self, boot_id: bytes) -> None:
        if boot_id == self.peer.boot_id:
            needed = self._needs_peer()
        else:
            needed = any(self._needs(each) for each in self.donors if each.boot_id == boot_id)
        if needed:
            self.fail("peer_lost")

    # --- state -----------------------------------------------------------------------------------

    @property
    def peers(self) -> tuple[Peer, ...]:
        return (self.peer, *self.donors)

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots it holds."""
        return self._slots

    @property
    def num_quarantined(self) -> int:
        return len(self._slots) if self.awaits_proof else 0

    @property
    def awaits_proof(self) -> bool:
        """Over but for the proof that others have stopped: its slots are in quarantine."""
        return self._ending and not self.closed and bool(self._open_writers()) and self._own_done()

    def describe(self) -> str:
        return (
            f"transfer {self.key} ({self._ports.pool.name}): staged={self._stage is not None}"
            f" published={self._entry is not None} ending={self._ending}"
            f" releases={self._num_releases} open puts={self._open_puts}"
            f" stores={self._open_stores}"
            f" may be written by={[peer.engine_id for peer in self._open_writers()]}"
        )

    # --- for the two sides -----------------------------------------------------------------------

    @property
    @abstractmethod
    def _peer_role(self) -> str:
        """``prefill`` or ``decode``."""

    @abstractmethod
    def _staged(self) -> None:
        """``Stage`` has come."""

    @abstractmethod
    def _mark_block(self, block: int) -> None:
        """A hit block is good in our slots."""

    @abstractmethod
    def _has_block(self, block: int) -> bool:
        """Whether a hit block is good in our slots."""

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
    def _planned_writers(self) -> list[Peer]:
        """Those whom the plan lets write to our slots, and who may not have finished."""

    def _complete(self) -> bool:
        """Whether the slots can be freed before the router says ``End``."""
        return False

    @property
    def _num_cached_blocks(self) -> int:
        """Leading hit blocks that the prefill engine has itself."""
        return 0 if self._stage is None else self._stage.num_cached_blocks

    def _publish(self) -> bool:
        assert self._stage is not None
        try:
            self._entry = self._ports.table.publish(
                self.key,
                self._limit,
                self._num_tokens,
                self._stage.digest,
                self._slots,
                self._num_cached_blocks,
            )
        except StagingFull as exc:
            logger.warning("transfer %s: %s", self.key, exc)
            self.fail("table_full")
            return False
        return True

    def _saves(self, first_page: int, last_page: int) -> bool:
        """Whether these pages are the prefill engine's: cached ones, or those beyond the hit."""
        per_block = self._ports.geometry.pages_per_block
        num_pages = self._ports.geometry.num_pages(self._num_tokens)
        cached, end = self._num_cached_blocks * per_block, self._limit * per_block
        return 0 <= first_page < last_page <= cached or end <= first_page < last_page <= num_pages

    def _block_good(self, block: int) -> None:
        if block < self._limit:
            self._mark_block(block)

    def _progress(self) -> None:
        """Something was read, pushed, received or cut."""
        self._confirm_cut()
        over = self._ending or self._failed
        if not over and self._entry is None and self._stage is not None:
            self._check_good()
        self._advance()

    def _push_failed(self, _peer: Peer, outcome: PutOutcome) -> None:
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
        if self._ending:
            self._ask_donors()
        if not retired or not self._own_done() or self._open_writers():
            return
        self._close()

    def _own_writes_done(self) -> bool:
        return self._open_puts == 0 and (self._reader is None or self._reader.is_done)

    def _own_done(self) -> bool:
        return self._own_writes_done() and self._open_stores == 0

    def _open_writers(self) -> list[Peer]:
        """Those who may write to our slots, as far as we know."""
        if self._stage is not None:
            may_write = self._planned_writers()
        else:
            may_write = list(self.peers) if self._uncertain else []
        return [peer for peer in may_write if peer.boot_id not in self._stopped]

    def _segments_of(self, reader: Peer) -> list[SegmentSpec]:
        assert self._stage is not None
        return [each for each in self._stage.segments if each.reader == reader.engine_id]

    def _readers(self, candidates: Sequence[Peer]) -> list[Peer]:
        """Those of them that read for this transfer."""
        return [peer for peer in candidates if self._segments_of(peer)]

    def _reads_beyond_cut(self, donor: Peer) -> bool:
        """Whether a block of this donor was cut off the hit."""
        return any(segment.last_block > self._limit for segment in self._segments_of(donor))

    def _needs(self, donor: Peer) -> bool:
        """Whether a donor's part is not all here. Before ``Stage`` nobody's is."""
        if self._stage is None:
            return True
        return any(
            not self._has_block(block)
            for segment in self._segments_of(donor)
            for block in range(segment.first_block, min(segment.last_block, self._limit))
        )

    def _tell_peer(self) -> None:
        """Say that we write nothing more.

        Also when we never learnt of a ``Stage``: the peer's may have come, and it waits for us.
        """
        if self._told_peer or self._writes_ambiguous:
            return
        self._told_peer = True
        peer = self._asked_by or self.peer
        if self._uncertain and self.peer.boot_id not in self._stopped:
            notice: WriterStopped | StopQuery = StopQuery(
                self.key, self.peer.boot_id, self._ports.contact
            )
        else:
            notice = WriterStopped(self.key, peer.boot_id, self._ports.boot_id)
        self._ports.peers.notify(peer, notice)

    def _ask_donors(self) -> None:
        """Let those stop, and say so, who may still write.

        A donor that was never told to start has nobody else to learn it from. Asking does no harm
        while we drain: what we published was pushed to our peer at the same time.
        """
        for writer in self._open_writers():
            if writer.boot_id != self.peer.boot_id and writer.boot_id not in self._asked:
                self._asked.add(writer.boot_id)
                query = StopQuery(self.key, writer.boot_id, self._ports.contact)
                self._ports.peers.notify(writer, query)

    def _close(self) -> None:
        self.closed = True
        if self._entry is not None:
            self._ports.table.free(self._entry)
        self._ports.pool.release(self._slots)
        self._ports.tell_router(Ended(self.key))
        unproven = {self.peer.boot_id} if self._writes_ambiguous else set()
        self._ports.closed(self.key, frozenset(unproven))
