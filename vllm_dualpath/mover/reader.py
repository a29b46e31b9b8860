"""Reading one mover's part of a plan, and pushing every good block on at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from vllm_dualpath.errors import BlockCorrupt, BlockNotFound, OutOfDescriptors, StorageError
from vllm_dualpath.messages import BlocksGood, Peer, SegmentDone, SegmentSpec, TransferKey
from vllm_dualpath.mover.peers import PutOutcome
from vllm_dualpath.mover.ports import Ports
from vllm_dualpath.mover.storage_queue import IoTask
from vllm_dualpath.storage.base import ReadBlock
from vllm_dualpath.transport.base import PutArray

logger = logging.getLogger(__name__)


def failure_reason(error: StorageError) -> str:
    """The label under which a failed read is counted."""
    if isinstance(error, BlockCorrupt):
        return "corrupt"
    return "missing" if isinstance(error, BlockNotFound) else "io_error"


class SegmentReader:
    """Reads the blocks of its segments into ``slots`` and pushes them to the peer's.

    ``on_good(block)`` after each sound block; ``on_quiet()`` whenever a read or push has ended;
    after that ``is_done`` and ``is_quiet_from`` tell what is still under way. ``on_push_failed``
    when the peer cannot be reached.
    """

    def __init__(
        self,
        ports: Ports,
        key: TransferKey,
        segments: Sequence[SegmentSpec],
        hashes: Sequence[bytes],
        slots: Sequence[int],
        peer: Peer,
        on_good: Callable[[int], None],
        on_quiet: Callable[[], None],
        on_push_failed: Callable[[PutOutcome], None],
    ) -> None:
        self._ports = ports
        self._key = key
        self._segments = segments
        self._hashes = hashes
        self._slots = slots
        self._peer = peer
        self._on_good = on_good
        self._on_quiet = on_quiet
        self._on_push_failed = on_push_failed
        self._limit = segments[-1].last_block
        """Blocks at or beyond it are not wanted (any more)."""
        self._tasks: dict[int, IoTask] = {}
        self._pushing: set[int] = set()
        self._error = ""
        self._reported = False

    def start(self) -> None:
        """Queue every read, in order."""
        for segment in self._segments:
            for block in range(segment.first_block, segment.last_block):
                self._tasks[block] = self._make_task(block)
        for task in self._tasks.values():
            self._ports.storage.submit_read(task)

    @property
    def is_done(self) -> bool:
        """Nothing is read or pushed, and nothing will be."""
        return not self._tasks and not self._pushing

    def is_quiet_from(self, block: int) -> bool:
        """Nothing at or beyond ``block`` is read or pushed any more."""
        return not any(open_block >= block for open_block in (*self._tasks, *self._pushing))

    def cut(self, block: int) -> None:
        """Drop what is queued at or beyond ``block``; what runs is left to end."""
        self._limit = min(self._limit, block)
        for open_block, task in self._tasks.items():
            if open_block >= block:
                self._ports.storage.cancel(task)

    def owns(self, task: IoTask) -> bool:
        """Whether ``task`` is a read of this reader."""
        return any(mine is task for mine in self._tasks.values())

    def drop_stalled(self, stalled: Sequence[IoTask]) -> None:
        """Let the index forget blocks whose read hangs: the next request shall not wait for it."""
        hung = {id(task) for task in stalled if task.started_s is not None}
        hashes = [self._hashes[block] for block, task in self._tasks.items() if id(task) in hung]
        if hashes:
            self._ports.dropped(tuple(hashes), False)

    def _make_task(self, block: int) -> IoTask:
        view = self._ports.slot_view(self._slots[block])
        verify = self._ports.config.verify_checksums
        return IoTask(
            work=ReadBlock(self._hashes[block], view, verify),
            done=partial(self._read_done, block),
            num_tokens=self._ports.geometry.block_tokens,
        )

    def _read_done(self, block: int, task: IoTask) -> None:
        del self._tasks[block]
        self._ports.counters.storage_read_bytes += task.num_bytes
        if task.error is not None:
            self._failed(block, task.error)
        elif block < self._limit and not task.cancelled:
            self._on_good(block)
            self._push(block)
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

    def _push(self, block: int) -> None:
        self._pushing.add(block)
        notice = BlocksGood(self._key, self._peer.boot_id, block, block + 1)
        self._ports.peers.put(
            self._peer, self._pieces(block), notice, partial(self._push_done, block)
        )

    def _pieces(self, block: int) -> PutArray:
        geometry = self._ports.geometry
        remote = self._peer.staging_address + self._peer.slots[block] * geometry.slot_bytes
        local = self._ports.slot_address(self._slots[block])
        return np.array([[local, remote, geometry.payload_bytes]], dtype=np.uint64)

    def _push_done(self, block: int, outcome: PutOutcome) -> None:
        self._pushing.discard(block)
        if outcome is PutOutcome.DONE:
            counters = self._ports.counters
            if self._ports.pool.name == "decode":
                counters.push_to_prefill_bytes += self._ports.geometry.payload_bytes
            else:
                counters.push_to_decode_bytes += self._ports.geometry.payload_bytes
        else:
            self._on_push_failed(outcome)
        self._after()

    def _after(self) -> None:
        if self.is_done and not self._reported:
            self._reported = True
            self._report()
        self._on_quiet()

    def _report(self) -> None:
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
