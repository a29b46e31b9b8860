"""Reading one mover's part of a plan, and pushing every good block on at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from vllm_dualpath.errors import BlockCorrupt, BlockNotFound, OutOfDescriptors, StorageError
from vllm_dualpath.messages import BlocksGood, Peer, SegmentDone, SegmentSpec, TransferKey
from vllm_dualpath.mover.peers import PutOutcome
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.slot_sources import SlotSource
from vllm_dualpath.mover.storage_queue import IoTask
from vllm_dualpath.storage.base import ReadBlock
from vllm_dualpath.transport.base import PutArray

logger = logging.getLogger(__name__)


def failure_reason(error: StorageError) -> str:
    """The label under which a failed read is counted."""
    if isinstance(error, BlockCorrupt):
        return "corrupt"
    return "missing" if isinstance(error, BlockNotFound) else "io_error"


@dataclass(frozen=True, slots=True)
class Target:
    """A mover that gets every block read."""

    peer: Peer
    role: str
    """``prefill`` or ``decode``: which of the transfer's two sides it is."""


@dataclass(slots=True, eq=False)
class _OpenBlock:
    """A block that has its slot: read first, then pushed to each target."""

    slot: int
    task: IoTask
    is_read: bool = False
    pushing_to: set[bytes] | None = None
    """Boot ids of the targets it is being pushed to."""


class SegmentReader:
    """Reads the blocks of its segments into slots and pushes each to the same block's slot at every
    target.

    ``on_good(block)`` after each sound block; ``on_quiet()`` whenever a read or push has ended;
    after that ``is_done`` and ``is_quiet_from`` tell what is still under way. ``on_push_failed``
    when a target cannot be reached. ``donated``: count what is read as read for others.
    """

    def __init__(
        self,
        ports: Ports,
        key: TransferKey,
        segments: Sequence[SegmentSpec],
        hashes: Sequence[bytes],
        slots: SlotSource,
        targets: Sequence[Target],
        on_good: Callable[[int], None],
        on_quiet: Callable[[], None],
        on_push_failed: Callable[[Peer, PutOutcome], None],
        donated: bool = False,
    ) -> None:
        self._ports = ports
        self._key = key
        self._segments = segments
        self._hashes = hashes
        self._slots = slots
        self._targets = targets
        self._on_good = on_good
        self._on_quiet = on_quiet
        self._on_push_failed = on_push_failed
        self._donated = donated
        self._limit = segments[-1].last_block
        """Blocks at or beyond it are not wanted (any more)."""
        self._unread = deque(
            block for part in segments for block in range(part.first_block, part.last_block)
        )
        """Without a slot yet."""
        self._open: dict[int, _OpenBlock] = {}
        self._withdraw: Callable[[], None] | None = None
        """While it waits for a slot: gives the place in the line up."""
        self._error = ""
        self._reported = False

    def start(self) -> None:
        """Queue reads, in order, as far as there are slots; the others follow by themselves."""
        self._read_more()

    @property
    def is_done(self) -> bool:
        """Nothing is read or pushed, and nothing will be."""
        return not self._unread and not self._open

    def is_done_with(self, boot_id: bytes) -> bool:
        """Nothing is pushed to this target, and nothing will be, though a read may still run."""
        return not self._unread and all(
            boot_id not in (each.pushing_to or ()) if each.is_read else block >= self._limit
            for block, each in self._open.items()
        )

    @property
    def waits_for_slot(self) -> bool:
        return self._withdraw is not None

    @property
    def num_open(self) -> int:
        """Blocks that have their slot: they are read or pushed."""
        return len(self._open)

    def is_quiet_from(self, block: int) -> bool:
        """Nothing at or beyond ``block`` is read or pushed any more."""
        return not any(open_block >= block for open_block in (*self._unread, *self._open))

    def cut(self, block: int) -> None:
        """Drop what is queued at or beyond ``block``; what runs is left to end."""
        self._limit = min(self._limit, block)
        while self._unread and self._unread[-1] >= block:
            self._unread.pop()
        if not self._unread and self._withdraw is not None:
            withdraw, self._withdraw = self._withdraw, None
            withdraw()
        for open_block, each in self._open.items():
            if open_block >= block and not each.is_read:
                self._ports.storage.cancel(each.task)
        self._report_if_done()

    def owns(self, task: IoTask) -> bool:
        """Whether ``task`` is a read of this reader."""
        return any(each.task is task for each in self._reading())

    def drop_stalled(self, stalled: Sequence[IoTask]) -> None:
        """Let the index forget blocks whose read hangs: the next request shall not wait for it."""
        hung = {id(task) for task in stalled if task.started_s is not None}
        blocks = [block for block, each in self._open.items() if id(each.task) in hung]
        if blocks:
            self._ports.dropped(tuple(self._hashes[block] for block in blocks), False)

    def num_stuck(self, stalled: Collection[IoTask], stalled_peers: Collection[bytes]) -> int:
        """Open blocks that wait for one of these reads or one of these peers."""
        return sum(
            any(boot_id in stalled_peers for boot_id in each.pushing_to or ())
            if each.is_read
            else each.task in stalled
            for each in self._open.values()
        )

    def _reading(self) -> list[_OpenBlock]:
        return [each for each in self._open.values() if not each.is_read]

    def _read_more(self) -> None:
        while self._unread and self._withdraw is None:
            slot = self._slots.try_take(self._unread[0])
            if slot is not None:
                self._read(self._unread.popleft(), slot)
                continue
            # The slot may come before wait() returns; then there is nothing to withdraw.
            self._withdraw = _nothing
            withdraw = self._slots.wait(self._granted)
            if self._withdraw is _nothing:
                self._withdraw = withdraw

    def _granted(self, slot: int) -> None:
        self._withdraw = None
        self._read(self._unread.popleft(), slot)
        self._read_more()

    def _read(self, block: int, slot: int) -> None:
        task = IoTask(
            work=ReadBlock(
                self._hashes[block],
                self._ports.slot_view(slot),
                self._ports.config.verify_checksums,
            ),
            done=partial(self._read_done, block),
            num_tokens=self._ports.geometry.block_tokens,
        )
        self._open[block] = _OpenBlock(slot, task)
        self._ports.storage.submit_read(task)

    def _read_done(self, block: int, task: IoTask) -> None:
        opened = self._open[block]
        opened.is_read = True
        self._ports.counters.storage_read_bytes += task.num_bytes
        self._ports.counters.donated_bytes += task.num_bytes if self._donated else 0
        if task.error is not None:
            self._failed(block, task.error)
        elif block < self._limit and not task.cancelled:
            self._on_good(block)
            self._push(block, opened)
        if not opened.pushing_to:
            self._close(block)
        self._after()

    def _failed(self, block: int, error: StorageError) -> None:
        reason = failure_reason(error)
        logger.warning("transfer %s: block %d: %s", self._key, block, error)
        self._ports.counters.load_failures[reason] += 1
        self._ports.counters.corrupt_blocks += reason == "corrupt"
        # Also after an I/O error: the next request shall not fail on the same block.
        if not isinstance(error, OutOfDescriptors):
            self._ports.dropped((self._hashes[block],), reason != "io_error")
        if block < self._limit:
            self._error = f"{reason}: {error}"
            self.cut(block)

    def _push(self, block: int, opened: _OpenBlock) -> None:
        opened.pushing_to = {target.peer.boot_id for target in self._targets}
        for target in self._targets:
            peer = target.peer
            notice = BlocksGood(self._key, peer.boot_id, block, block + 1)
            pieces = self._pieces(opened.slot, peer, block)
            self._ports.peers.put(peer, pieces, notice, partial(self._push_done, block, target))

    def _pieces(self, slot: int, peer: Peer, block: int) -> PutArray:
        geometry = self._ports.geometry
        remote = peer.staging_address + peer.slots[block] * geometry.slot_bytes
        local = self._ports.slot_address(slot)
        return np.array([[local, remote, geometry.payload_bytes]], dtype=np.uint64)

    def _push_done(self, block: int, target: Target, outcome: PutOutcome) -> None:
        opened = self._open[block]
        assert opened.pushing_to is not None
        opened.pushing_to.discard(target.peer.boot_id)
        if not opened.pushing_to:
            self._close(block)
        if outcome is PutOutcome.DONE:
            self._count_push(target)
        else:
            self._on_push_failed(target.peer, outcome)
        self._after()

    def _count_push(self, target: Target) -> None:
        counters, num_bytes = self._ports.counters, self._ports.geometry.payload_bytes
        if target.role == "prefill":
            counters.push_to_prefill_bytes += num_bytes
        else:
            counters.push_to_decode_bytes += num_bytes

    def _close(self, block: int) -> None:
        # Its slot may go to another reader at once.
        self._slots.give_back(self._open.pop(block).slot)

    def _after(self) -> None:
        self._read_more()
        self._report_if_done()
        self._on_quiet()

    def _report_if_done(self) -> None:
        if not self.is_done or self._reported:
            return
        self._reported = True
        last_block = self._segments[-1].last_block
        self._ports.tell_router(
            SegmentDone(
                key=self._key,
                first_block=self._segments[0].first_block,
                last_block=last_block,
                good_until=max(min(self._limit, last_block), self._segments[0].first_block),
                error=self._error or ("" if self._limit >= last_block else "cut"),
            )
        )


def _nothing() -> None:
    """Withdraws nothing."""
