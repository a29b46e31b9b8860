"""The node's storage queue: block reads and writes in flight, results on the loop's thread.

A store that moves blocks on threads of its own (``AsyncBlockStore``) does so here; the calls of any
other store run on Python threads. Reads and writes are apart either way, so loads never wait behind
stores, and neither waits behind a scan or a removal. A store call may block for as long as the file
system likes; nobody else does.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vllm_dualpath.errors import StorageError, TransferTimeout
from vllm_dualpath.mover.call_threads import Call, CallThreads
from vllm_dualpath.mover.loop import EventLoop
from vllm_dualpath.storage.base import AsyncBlockStore, BlockStore, Finished, ReadBlock, WriteBlock

_CLOSE_S = 10.0

_NUM_CALL_THREADS = 2
_MAX_TOUCHES = 256
"""For scans and removals, which may each take minutes."""

Work = ReadBlock | WriteBlock | Callable[[], int]


@dataclass(slots=True, eq=False)
class IoTask:
    """One block to move, or any other call to the store that returns a number of bytes.

    ``done`` runs once, on the loop's thread, also when cancelled.
    """

    work: Work
    done: Callable[[IoTask], None]
    num_tokens: int = 0
    """Tokens waiting behind the storage NIC because of this task."""
    cancelled: bool = False
    """Never started; set by ``StorageQueue.cancel``."""
    started_s: float | None = None
    """Of a read: as ``StorageQueue.stalled_reads`` last saw it."""
    num_bytes: int = 0
    error: StorageError | None = None


def _call_of(run: Callable[[], None], ended: Callable[[Call], None]) -> Call:
    def call() -> int:
        run()
        return 0

    return Call(call, ended)


class StorageQueue:
    """Owned by the loop's thread. ``num_threads``: of a store that has none of its own."""

    def __init__(self, store: BlockStore, loop: EventLoop, num_threads: int = 4) -> None:
        self._loop = loop
        self._store = store
        self._async_store = store if isinstance(store, AsyncBlockStore) else None
        self._reads: dict[IoTask, int | Call] = {}
        """With the store's ticket, or the call that a thread makes."""
        self._writes: dict[IoTask, int | Call] = {}
        self._tickets: dict[int, IoTask] = {}
        self._watching = False
        self._last_read_s = 0.0
        """When a read last ended, or the first was queued."""
        self._busy_since_s: float | None = None
        self._busy_s = 0.0
        """Until ``_busy_since_s``, while reads are open; until now, while none is."""
        self._calls = CallThreads("call", _NUM_CALL_THREADS, loop)
        self._touches = CallThreads("touch", 1, loop)
        self._quarantines = CallThreads("quarantine", 1, loop)
        """Apart: a bad block's end must not wait behind notes of use."""
        self._lanes = [self._calls, self._touches, self._quarantines]
        if self._async_store is None:
            self._read_threads = CallThreads("read", num_threads, loop)
            self._write_threads = CallThreads("write", num_threads, loop)
            self._lanes += [self._read_threads, self._write_threads]

    @property
    def read_queue_tokens(self) -> int:
        """Tokens of reads that have not ended."""
        return sum(task.num_tokens for task in self._reads)

    @property
    def read_busy_s(self) -> float:
        """Seconds, in all, with at least one read that had not ended."""
        open_s = 0.0 if self._busy_since_s is None else time.monotonic() - self._busy_since_s
        return self._busy_s + open_s

    @property
    def num_open(self) -> int:
        return len(self._reads) + len(self._writes)

    @property
    def num_open_writes(self) -> int:
        return len(self._writes)

    def submit_read(self, task: IoTask) -> None:
        """Queue a read."""
        if not self._reads:
            self._last_read_s = time.monotonic()
        self._submit(task, self._reads)
        if self._reads and self._busy_since_s is None:
            self._busy_since_s = time.monotonic()

    def submit_write(self, task: IoTask) -> None:
        """Queue a write, a removal or a scan."""
        self._submit(task, self._writes)

    def cancel(self, task: IoTask) -> None:
        """End a task that has not started, without waiting for its turn; let one that runs end."""
        handle = self._reads.get(task, self._writes.get(task))
        if handle is None or task.cancelled:
            return
        if isinstance(handle, Call):
            assert handle.threads is not None, "a call is submitted before it is known here"
            task.cancelled = handle.threads.cancel(handle)
        elif self._async_store is not None:
            task.cancelled = self._async_store.cancel(handle)

    def stalled_reads(self, now_s: float, deadline_s: float) -> list[IoTask]:
        """Reads that make no progress: running too long, or queued while no read at all ends."""
        all_stalled = now_s - self._last_read_s > deadline_s
        for task, handle in self._reads.items():
            task.started_s = self._started_s(handle)
        return [
            task
            for task in self._reads
            if (all_stalled if task.started_s is None else now_s - task.started_s > deadline_s)
        ]

    def close(self) -> None:
        """Drop queued reads, finish queued writes. Raises ``TransferTimeout`` if a call does not
        end.
        """
        for task in list(self._reads):
            self.cancel(task)
        deadline_s = time.monotonic() + _CLOSE_S
        if self._async_store is not None:
            self._await_tickets(self._async_store, deadline_s)
            if self._watching:
                self._loop.unwatch(self._async_store)
        for lane in self._lanes:
            lane.close(deadline_s)

    def _submit(self, task: IoTask, group: dict[IoTask, int | Call]) -> None:
        work = task.work
        if not isinstance(work, ReadBlock | WriteBlock):
            group[task] = self._call(self._calls, task, work)
        elif self._async_store is None:
            threads = self._read_threads if group is self._reads else self._write_threads
            group[task] = self._call(threads, task, partial(work.run, self._store))
        else:
            try:
                group[task] = self._start(self._async_store, task, work)
            except StorageError as exc:
                task.error = exc
                self._loop.call_later(0.0, partial(task.done, task))

    def _call(self, lane: CallThreads, task: IoTask, run: Callable[[], int]) -> Call:
        call = Call(run, partial(self._call_ended, task))
        lane.submit(call)
        return call

    def _start(self, store: AsyncBlockStore, task: IoTask, work: ReadBlock | WriteBlock) -> int:
        ticket = store.submit(work)
        self._tickets[ticket] = task
        if not self._watching:
            # Not before: a store has no descriptor until it moves its first block.
            self._watching = True
            self._loop.watch(store, partial(self._drain, store))
        return ticket

    def _started_s(self, handle: int | Call) -> float | None:
        if isinstance(handle, Call):
            return handle.started_s
        return None if self._async_store is None else self._async_store.started_s(handle)

    def _drain(self, store: AsyncBlockStore) -> None:
        for finished in store.finished():
            self._loop.guard(partial(self._block_ended, finished))

    def _block_ended(self, finished: Finished) -> None:
        task = self._tickets.pop(finished.ticket)
        task.num_bytes, task.error = finished.num_bytes, finished.error
        task.cancelled = finished.cancelled
        if finished.follow_up is not None and finished.error is not None:
            # A bad block is out of the store before anybody can ask for it, or store it, again.
            quarantine = _call_of(finished.follow_up, lambda _call: self._end(task))
            group = self._reads if task in self._reads else self._writes
            group[task] = quarantine  # so that one that hangs is seen to
            self._quarantines.submit(quarantine)
            return
        self._end(task)
        # On a slow store notes of use are dropped: they only order evictions.
        if finished.follow_up is not None and self._touches.num_waiting < _MAX_TOUCHES:
            self._touches.submit(_call_of(finished.follow_up, _nothing))

    def _call_ended(self, task: IoTask, call: Call) -> None:
        task.num_bytes, task.error = call.num_bytes, call.error
        self._end(task)

    def _end(self, task: IoTask) -> None:
        if self._reads.pop(task, None) is not None and not task.cancelled:
            self._last_read_s = time.monotonic()
        self._writes.pop(task, None)
        if not self._reads and self._busy_since_s is not None:
            self._busy_s += time.monotonic() - self._busy_since_s
            self._busy_since_s = None
        task.done(task)

    def _await_tickets(self, store: AsyncBlockStore, deadline_s: float) -> None:
        if not self._tickets:
            return
        poller = select.poll()
        poller.register(store.fileno(), select.POLLIN)
        while self._tickets:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not poller.poll(left_s * 1000):
                raise TransferTimeout(
                    f"{len(self._tickets)} blocks were not moved within {_CLOSE_S} s"
                )
            self._drain(store)


def _nothing(_call: Call) -> None:
    """Nobody waits for this call."""
