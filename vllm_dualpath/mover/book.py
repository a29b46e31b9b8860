"""Every transfer and reservation of one mover, and the messages that concern one of them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from vllm_dualpath.errors import ProtocolError
from vllm_dualpath.messages import (
    CutDone,
    Donate,
    Ended,
    Notice,
    Reserve,
    Reserved,
    Saved,
    Stage,
    StopQuery,
    TransferFailed,
    TransferKey,
    WriterStopped,
)
from vllm_dualpath.mover.decode import DecodeTransfer
from vllm_dualpath.mover.donor import DonorTransfer
from vllm_dualpath.mover.part import Part
from vllm_dualpath.mover.prefill import PrefillTransfer
from vllm_dualpath.mover.storage_queue import IoTask
from vllm_dualpath.mover.transfer import Transfer
from vllm_dualpath.plan import ReadPlan, Segment

if TYPE_CHECKING:
    from vllm_dualpath.mover.ports import Ports

logger = logging.getLogger(__name__)

_MAX_TOMBSTONES = 1 << 16


class TransferBook:
    """Owned by the loop's thread.

    A key that has ended leaves a tombstone, so that a late ``Reserve`` or ``Stage`` cannot revive
    it.
    """

    def __init__(self) -> None:
        self._ports: Ports | None = None
        self._parts: dict[TransferKey, Part] = {}
        self._waiting: dict[TransferKey, Callable[[], None]] = {}
        self._tombstones: OrderedDict[TransferKey, frozenset[bytes]] = OrderedDict()
        """With the boot ids of those to whom no proof can be given: see ``Ports.closed``."""
        self.donor_slots_stuck = False

    def bind(self, ports: Ports) -> None:
        """Transfers are made with ``ports``, which in turn report to this book."""
        self._ports = ports

    @property
    def ports(self) -> Ports:
        assert self._ports is not None
        return self._ports

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(self._parts.values())

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Those with slots for a whole prompt."""
        return tuple(part for part in self._parts.values() if isinstance(part, Transfer))

    @property
    def num_open(self) -> int:
        return len(self._parts) + len(self._waiting)

    # --- router ----------------------------------------------------------------------------------

    def reserve(self, reserve: Reserve) -> None:
        """Grant slots now or later; refuse what can never be granted."""
        key = reserve.key
        if self._is_used(key):
            self._refuse(key, "key already used")
            return
        if reserve.pool != self.ports.pool.name:
            self._refuse(key, f"no pool {reserve.pool!r} here")
            return
        num_blocks = self.ports.geometry.num_blocks(reserve.num_tokens)
        most = min(self.ports.pool.num_slots, self.ports.table.max_blocks)
        if not 0 < num_blocks <= most:
            self._refuse(key, f"{num_blocks} slots asked for, at most {most}")
            return
        # The grant may come before reserve() returns; then there is nothing to withdraw.
        self._waiting[key] = _nothing
        withdraw = self.ports.pool.reserve(num_blocks, lambda slots: self._granted(reserve, slots))
        if key in self._waiting:
            self._waiting[key] = withdraw

    def stage(self, stage: Stage) -> None:
        transfer = self._parts.get(stage.key)
        if not isinstance(transfer, Transfer):
            self._refuse(stage.key, "not reserved")
            return
        problem = self._check(stage, transfer)
        if problem:
            self._refuse(stage.key, problem)
        else:
            transfer.on_stage(stage)

    def donate(self, donate: Donate) -> None:
        """Read for others. Never waits for anything that a transfer holds."""
        problem = "key already used" if self._is_used(donate.key) else self._check_donation(donate)
        if problem:
            self._refuse(donate.key, problem)
            return
        part = self._parts[donate.key] = DonorTransfer(self.ports, donate)
        part.start()

    def cut(self, key: TransferKey, num_hit_blocks: int) -> None:
        part = self._parts.get(key)
        if part is None and self._tombstones.get(key):
            self._refuse(key, "a push failed under way")
        elif part is None:
            self.ports.tell_router(CutDone(key, num_hit_blocks))
        else:
            part.on_cut(num_hit_blocks)

    def end(self, key: TransferKey, drain: bool, *, staged: bool) -> None:
        """End, withdraw, or confirm what has ended before. ``staged``: see ``End``."""
        withdraw = self._waiting.pop(key, None)
        if withdraw is not None:
            withdraw()
        part = self._parts.get(key)
        if part is None:
            self._bury(key)
            self.ports.tell_router(Ended(key))
        else:
            part.on_end(drain, staged=staged)

    def peer_died(self, boot_id: bytes) -> None:
        """A mover left the cluster. Only a dead process is proof that it writes no more."""
        for part in self.parts:
            if any(peer.boot_id == boot_id for peer in part.peers):
                part.peer_lost(boot_id)
        self._check_peers()

    def router_lost(self) -> None:
        """End everything: nobody else will."""
        # The last first: withdrawing the head of the queue would grant the next.
        for key in reversed(list(self._waiting)):
            self._waiting.pop(key)()
            self._bury(key)
        for part in self.parts:
            part.on_router_lost()

    # --- engine ----------------------------------------------------------------------------------

    def saved(self, saved: Saved) -> None:
        transfer = self._parts.get(saved.key)
        if isinstance(transfer, PrefillTransfer):
            transfer.on_saved(saved)
        else:
            self._check_over(saved.key, "saved pages")

    def not_cached(self, key: TransferKey) -> None:
        transfer = self._parts.get(key)
        if isinstance(transfer, PrefillTransfer):
            transfer.on_not_cached()
        else:
            self._check_over(key, "cached blocks")

    def release(self, key: TransferKey) -> None:
        transfer = self._parts.get(key)
        if isinstance(transfer, Transfer):
            transfer.on_release()
        else:
            self._check_over(key, "release")

    def _check_over(self, key: TransferKey, what: str) -> None:
        """What the engine says too late is nothing; of what never was it must not speak."""
        if key not in self._tombstones:
            raise ProtocolError(f"{what} of unknown transfer {key}")

    # --- peers -----------------------------------------------------------------------------------

    def notice(self, notice: Notice) -> None:
        """A notice from another mover; what is not for us, or too late, is dropped."""
        if notice.receiver_boot_id != self.ports.boot_id:
            self.ports.counters.rejected_messages += 1
            return
        part = self._parts.get(notice.key)
        if isinstance(notice, StopQuery):
            self._stop_query(notice, part)
        elif part is None:
            logger.debug("late %s for transfer %s", type(notice).__name__, notice.key)
        elif not isinstance(part, Transfer):
            self.ports.counters.rejected_messages += 1
            logger.warning("transfer %s: %s to a donor", notice.key, type(notice).__name__)
        elif isinstance(notice, WriterStopped):
            part.on_writer_stopped(notice.sender_boot_id)
        else:
            part.on_notice(notice)

    def _stop_query(self, query: StopQuery, part: Part | None) -> None:
        if part is not None:
            part.on_stop_query(query.contact)
            return
        # What waits for slots must not be granted them, and push, after we said that we do not.
        if (withdraw := self._waiting.pop(query.key, None)) is not None:
            withdraw()
            self._refuse(query.key, "the peer has given this transfer up")
        self._bury(query.key)
        contact = query.contact
        if contact.boot_id in self._tombstones[query.key]:
            logger.warning("transfer %s: a push to the peer failed under way", query.key)
            return
        notice = WriterStopped(query.key, contact.boot_id, self.ports.boot_id)
        self.ports.peers.notify(contact, notice)

    # --- time ------------------------------------------------------------------------------------

    def stop_donating(self) -> bool:
        """Read no more for others, since the mover ends; whether there was something to stop."""
        donations = [part for part in self.parts if isinstance(part, DonorTransfer)]
        for part in donations:
            part.on_router_lost()
        return bool(donations)

    def check_progress(self) -> None:
        """Fail what is stalled, free what has proof, warn of what is stuck."""
        ports = self.ports
        now = ports.loop.now_s()
        deadlines = ports.config.deadlines
        stalled = ports.storage.stalled_reads(now, deadlines.stage_s)
        stalled_peers = ports.peers.stalled(now, deadlines.stage_s)
        stuck_donor = self._all_donor_slots_stuck(stalled, stalled_peers)
        for part in self.parts:
            part.on_stalled(stalled)
            if stuck_donor and part.waits_for_donor_slot:
                part.fail("stalled")
            for peer in part.peers:
                if peer.boot_id in stalled_peers:
                    part.peer_lost(peer.boot_id)
            if now - part.opened_s > deadlines.stuck_warning_s and not part.stuck_warned:
                part.stuck_warned = True
                logger.warning("open for %.0f s: %s", now - part.opened_s, part.describe())
        self._check_peers()

    def closed(self, key: TransferKey, unproven: frozenset[bytes]) -> None:
        """A part holds nothing any more. See ``Ports.closed``."""
        self._parts.pop(key, None)
        self._bury(key, unproven)

    def _all_donor_slots_stuck(
        self, stalled: Collection[IoTask], stalled_peers: Collection[bytes]
    ) -> bool:
        pool = self.ports.donor_pool
        num_stuck = sum(part.num_stuck_donor_slots(stalled, stalled_peers) for part in self.parts)
        self.donor_slots_stuck = 0 < pool.num_slots == num_stuck
        return self.donor_slots_stuck

    def _check_peers(self) -> None:
        """Look for peers whose process has died: on one host nothing else would tell."""
        dead: dict[bytes, bool] = {}
        for part in self.parts:
            for peer in part.peers:
                boot_id = peer.boot_id
                if boot_id not in dead:
                    dead[boot_id] = self.ports.peers.proven_dead(peer)
                    if dead[boot_id]:
                        self.ports.peers.forget(boot_id)
                if dead[boot_id]:
                    part.on_peer_dead(boot_id)

    def _granted(self, reserve: Reserve, slots: tuple[int, ...]) -> None:
        self._waiting.pop(reserve.key, None)
        kind = PrefillTransfer if reserve.pool == "prefill" else DecodeTransfer
        self._parts[reserve.key] = kind(self.ports, reserve, slots)
        self.ports.tell_router(Reserved(reserve.key, slots))

    def _check(self, stage: Stage, transfer: Transfer) -> str:
        """What is wrong with a ``Stage``; empty if nothing."""
        num_blocks = self.ports.geometry.num_blocks(stage.num_tokens)
        if num_blocks != len(transfer.slots) or len(stage.peer.slots) != num_blocks:
            return f"{num_blocks} blocks, {len(transfer.slots)}/{len(stage.peer.slots)} slots"
        if not stage.num_hit_blocks <= len(stage.block_hashes) <= num_blocks:
            return f"{stage.num_hit_blocks} hits, {len(stage.block_hashes)} full blocks"
        if stage.num_releases == 0:
            return "nobody will take the slots"
        parts = (Segment(s.reader, s.first_block, s.last_block) for s in stage.segments)
        try:
            plan = ReadPlan(stage.num_hit_blocks, tuple(parts), stage.num_cached_blocks)
        except ValueError as exc:
            return str(exc)
        readers = {segment.reader for segment in plan.segments}
        known = {self.ports.engine_id, stage.peer.engine_id}
        strangers = readers - known - {donor.engine_id for donor in transfer.donors}
        return f"readers {sorted(strangers)} are not known" if strangers else ""

    def _check_donation(self, donate: Donate) -> str:
        """What is wrong with a ``Donate``; empty if nothing."""
        if not self.ports.donor_pool.num_slots:
            return "no donor slots here"
        if len({donate.prefill.boot_id, donate.decode.boot_id, self.ports.boot_id}) < 3:
            return "donor and sides are not three movers"
        end = 0
        for segment in donate.segments:
            if segment.reader != self.ports.engine_id:
                return f"a segment of {segment.reader}"
            if not end <= segment.first_block < segment.last_block:
                return f"{segment} does not follow block {end}"
            end = segment.last_block
        least = min(
            len(donate.block_hashes), *map(len, (donate.prefill.slots, donate.decode.slots))
        )
        return "" if 0 < end <= least else f"blocks up to {end}, hashes and slots for {least}"

    def _is_used(self, key: TransferKey) -> bool:
        return key in self._tombstones or key in self._parts or key in self._waiting

    def _refuse(self, key: TransferKey, reason: str) -> None:
        self.ports.counters.rejected_messages += 1
        logger.warning("transfer %s refused: %s", key, reason)
        self.ports.tell_router(TransferFailed(key, reason))

    def _bury(self, key: TransferKey, unproven: frozenset[bytes] = frozenset()) -> None:
        self._tombstones.setdefault(key, unproven)
        while len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)


def _nothing() -> None:
    """Withdraws nothing."""
