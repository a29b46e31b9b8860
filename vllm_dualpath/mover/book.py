"""Every transfer and reservation of one mover, and the messages that concern one of them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_dualpath.errors import ProtocolError
from vllm_dualpath.messages import (
    BlocksGood,
    CutDone,
    Ended,
    Notice,
    PagesGood,
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
from vllm_dualpath.mover.prefill import PrefillTransfer
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
        self._transfers: dict[TransferKey, Transfer] = {}
        self._waiting: dict[TransferKey, Callable[[], None]] = {}
        self._tombstones: OrderedDict[TransferKey, None] = OrderedDict()

    def bind(self, ports: Ports) -> None:
        """Transfers are made with ``ports``, which in turn report to this book."""
        self._ports = ports

    @property
    def ports(self) -> Ports:
        assert self._ports is not None
        return self._ports

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        return tuple(self._transfers.values())

    @property
    def num_open(self) -> int:
        return len(self._transfers) + len(self._waiting)

    # --- router ----------------------------------------------------------------------------------

    def reserve(self, reserve: Reserve) -> None:
        """Grant slots now or later; refuse what can never be granted."""
        key = reserve.key
        if key in self._tombstones or key in self._transfers or key in self._waiting:
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
        transfer = self._transfers.get(stage.key)
        if transfer is None:
            self._refuse(stage.key, "not reserved")
            return
        problem = self._check(stage, transfer)
        if problem:
            self._refuse(stage.key, problem)
        else:
            transfer.on_stage(stage)

    def cut(self, key: TransferKey, num_hit_blocks: int) -> None:
        transfer = self._transfers.get(key)
        if transfer is None:
            self.ports.tell_router(CutDone(key, num_hit_blocks))
        else:
            transfer.on_cut(num_hit_blocks)

    def end(self, key: TransferKey, drain: bool, *, staged: bool) -> None:
        """End, withdraw, or confirm what has ended before. ``staged``: see ``End``."""
        withdraw = self._waiting.pop(key, None)
        if withdraw is not None:
            withdraw()
        transfer = self._transfers.get(key)
        if transfer is None:
            self._bury(key)
            self.ports.tell_router(Ended(key))
        else:
            transfer.on_end(drain, staged=staged)

    def peer_died(self, boot_id: bytes) -> None:
        """A mover left the cluster. Only a dead process is proof that it writes no more."""
        for transfer in self.transfers:
            if transfer.peer.boot_id == boot_id:
                transfer.peer_lost()
        self._check_peers()

    def router_lost(self) -> None:
        """End everything: nobody else will."""
        # The last first: withdrawing the head of the queue would grant the next.
        for key in reversed(list(self._waiting)):
            self._waiting.pop(key)()
            self._bury(key)
        for transfer in self.transfers:
            transfer.on_router_lost()

    # --- engine ----------------------------------------------------------------------------------

    def saved(self, saved: Saved) -> None:
        transfer = self._transfers.get(saved.key)
        if isinstance(transfer, PrefillTransfer):
            transfer.on_saved(saved)
        elif saved.key not in self._tombstones:
            raise ProtocolError(f"saved pages of unknown transfer {saved.key}")

    def release(self, key: TransferKey) -> None:
        transfer = self._transfers.get(key)
        if transfer is not None:
            transfer.on_release()
        elif key not in self._tombstones:
            raise ProtocolError(f"release of unknown transfer {key}")

    # --- peers -----------------------------------------------------------------------------------

    def notice(self, notice: Notice) -> None:
        """A notice from another mover; what is not for us, or too late, is dropped."""
        if notice.receiver_boot_id != self.ports.boot_id:
            self.ports.counters.rejected_messages += 1
            return
        transfer = self._transfers.get(notice.key)
        if isinstance(notice, StopQuery):
            self._stop_query(notice, transfer)
        elif transfer is None:
            logger.debug("late %s for transfer %s", type(notice).__name__, notice.key)
        elif isinstance(notice, BlocksGood | PagesGood):
            transfer.on_notice(notice)
        else:
            transfer.on_writer_stopped()

    def _stop_query(self, query: StopQuery, transfer: Transfer | None) -> None:
        if transfer is not None:
            transfer.on_stop_query(query.contact)
            return
        # What waits for slots must not be granted them, and push, after we said that we do not.
        if (withdraw := self._waiting.pop(query.key, None)) is not None:
            withdraw()
            self._refuse(query.key, "the peer has given this transfer up")
        self._bury(query.key)
        contact = query.contact
        self.ports.peers.notify(contact, WriterStopped(query.key, contact.boot_id))

    # --- time ------------------------------------------------------------------------------------

    def check_progress(self) -> None:
        """Fail what is stalled, free what has proof, warn of what is stuck."""
        ports = self.ports
        now = ports.loop.now_s()
        deadlines = ports.config.deadlines
        stalled = ports.storage.stalled_reads(now, deadlines.stage_s)
        stalled_peers = ports.peers.stalled(now, deadlines.stage_s)
        for transfer in self.transfers:
            transfer.on_stalled(stalled)
            if transfer.peer.boot_id in stalled_peers:
                transfer.peer_lost()
            if now - transfer.opened_s > deadlines.stuck_warning_s and not transfer.stuck_warned:
                transfer.stuck_warned = True
                logger.warning("open for %.0f s: %s", now - transfer.opened_s, transfer.describe())
        self._check_peers()

    def closed(self, key: TransferKey) -> None:
        """A transfer holds nothing any more."""
        self._transfers.pop(key, None)
        self._bury(key)

    def _check_peers(self) -> None:
        """Look for peers whose process has died: on one host nothing else would tell."""
        dead: dict[bytes, bool] = {}
        for transfer in self.transfers:
            boot_id = transfer.peer.boot_id
            if boot_id not in dead:
                dead[boot_id] = self.ports.peers.proven_dead(transfer.peer)
                if dead[boot_id]:
                    self.ports.peers.forget(boot_id)
            if dead[boot_id]:
                transfer.on_peer_dead()

    def _granted(self, reserve: Reserve, slots: tuple[int, ...]) -> None:
        self._waiting.pop(reserve.key, None)
        kind = PrefillTransfer if reserve.pool == "prefill" else DecodeTransfer
        self._transfers[reserve.key] = kind(self.ports, reserve, slots)
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
            plan = ReadPlan(stage.num_hit_blocks, tuple(parts))
        except ValueError as exc:
            return str(exc)
        readers = {segment.reader for segment in plan.segments}
        strangers = readers - {self.ports.engine_id, stage.peer.engine_id}
        return f"readers {sorted(strangers)} have no slots" if strangers else ""

    def _refuse(self, key: TransferKey, reason: str) -> None:
        self.ports.counters.rejected_messages += 1
        logger.warning("transfer %s refused: %s", key, reason)
        self.ports.tell_router(TransferFailed(key, reason))

    def _bury(self, key: TransferKey) -> None:
        self._tombstones[key] = None
        while len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)


def _nothing() -> None:
    """Withdraws nothing."""
