"""The node's storage queue: block reads and writes on threads of their own, results on the loop's.

Reads and writes have separate threads, so loads never wait behind stores. A store call may block
for as long as the file system likes; nobody else does.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from vllm_dualpath.errors import StorageError, TransferTimeout
from vllm_dualpath.mover.loop import EventLoop

logger = logging.getLogger(__name__)

_JOIN_S = 10.0


@dataclass(slots=True, eq=False)
class IoTask:
    """One call to the store. ``done`` runs once, on the loop's thread, also when cancelled."""

    call: Callable[[], int]
    done: Callable[[IoTask], None]
    num_tokens: int = 0
    """Tokens waiting behind the storage NIC because of this task."""
    cancelled: bool = False
    """Never started; set by ``StorageQueue.cancel``."""
    started_s: float | None = None
    num_bytes: int = 0
    error: StorageError | None = None


@dataclass(slots=True)
class _Lane:
    """One direction: a queue and its threads."""

    name: str
    tasks: queue.SimpleQueue[IoTask | None] = field(default_factory=queue.SimpleQueue)
    threads: list[threading.Thread] = field(default_factory=list)
    open_tasks: set[IoTask] = field(default_factory=set)
    last_progress_s: float = 0.0
    """When a task last ended, or the first was queued."""


class StorageQueue:
    """Owned by the loop's thread; the threads only run store calls."""

    def __init__(self, num_threads: int, loop: EventLoop) -> None:
        self._loop = loop
        self._finished: deque[IoTask] = deque()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._start_lock = threading.Lock()
        """A task is either started or cancelled, never both."""
        self._reads, self._writes = _Lane("read"), _Lane("write")
        for lane in (self._reads, self._writes):
            self._start_threads(lane, num_threads)
        loop.watch(self, self.drain)

    def fileno(self) -> int:
        """Readable while finished tasks wait for ``drain``."""
        return self._event_fd

    @property
    def read_queue_tokens(self) -> int:
        """Tokens of reads that have not ended."""
        return sum(task.num_tokens for task in self._reads.open_tasks)

    @property
    def num_open(self) -> int:
        return len(self._reads.open_tasks) + len(self._writes.open_tasks)

    @property
    def num_open_writes(self) -> int:
        return len(self._writes.open_tasks)

    def submit_read(self, task: IoTask) -> None:
        """Queue a read."""
        self._submit(self._reads, task)

    def submit_write(self, task: IoTask) -> None:
        """Queue a write, a removal or a scan."""
        self._submit(self._writes, task)

    def cancel(self, task: IoTask) -> None:
        """End a task that has not started, without waiting for its turn; let one that runs end."""
        with self._start_lock:
            if task.started_s is not None or task.cancelled:
                return
            task.cancelled = True
        self._finish(task)

    def drain(self) -> None:
        """Run ``done`` of every finished task."""
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            return
        while self._finished:
            task = self._finished.popleft()
            for lane in (self._reads, self._writes):
                if task in lane.open_tasks:
                    lane.open_tasks.remove(task)
                    if not task.cancelled:
                        lane.last_progress_s = time.monotonic()
            self._loop.guard(partial(task.done, task))

    def stalled_reads(self, now_s: float, deadline_s: float) -> list[IoTask]:
        """Reads that make no progress: running too long, or queued while no read at all ends."""
        all_stalled = now_s - self._reads.last_progress_s > deadline_s
        return [
            task
            for task in self._reads.open_tasks
            if (all_stalled if task.started_s is None else now_s - task.started_s > deadline_s)
        ]

    def close(self) -> None:
        """Drop queued reads, finish queued writes, join. Raises ``TransferTimeout`` if a call does
        not end.
        """
        for task in list(self._reads.open_tasks):
            self.cancel(task)
        lanes = (self._reads, self._writes)
        for lane in lanes:
            for _ in lane.threads:
                lane.tasks.put(None)
        deadline = time.monotonic() + _JOIN_S
        for lane in lanes:
            for thread in lane.threads:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    raise TransferTimeout(f"thread {thread.name} did not end in {_JOIN_S} s")
        self.drain()
        self._loop.unwatch(self)
        os.close(self._event_fd)

    def _submit(self, lane: _Lane, task: IoTask) -> None:
        if not lane.open_tasks:
            lane.last_progress_s = time.monotonic()
        lane.open_tasks.add(task)
        lane.tasks.put(task)

    def _finish(self, task: IoTask) -> None:
        self._finished.append(task)
        os.eventfd_write(self._event_fd, 1)

    def _start_threads(self, lane: _Lane, num_threads: int) -> None:
        for idx in range(num_threads):
            thread = threading.Thread(
                target=self._work, args=(lane,), name=f"dualpath-{lane.name}-{idx}", daemon=True
            )
            lane.threads.append(thread)
            thread.start()

    def _work(self, lane: _Lane) -> None:
        while (task := lane.tasks.get()) is not None:
            with self._start_lock:
                if task.cancelled:
                    continue
                task.started_s = time.monotonic()
            self._run(task)
            self._finish(task)

    @staticmethod
    def _run(task: IoTask) -> None:
        try:
            task.num_bytes = task.call()
        except StorageError as exc:
            task.error = exc
        except Exception as exc:
            logger.exception("mover: a store call failed unexpectedly")
            task.error = StorageError(f"unexpected {type(exc).__name__}: {exc}")
