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

from vllm_dualpath.errors import StorageError, TransferTimeout

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
    """Set by the owner: do not start. A call that runs is finished."""
    started_s: float | None = None
    num_bytes: int = 0
    error: StorageError | None = None


@dataclass(slots=True)
class _Lane:
    """One direction: a queue and its threads."""

    name: str
    tasks: queue.SimpleQueue[IoTask | None] = field(default_factory=queue.SimpleQueue)
    threads: list[threading.Thread] = field(default_factory=list)


class StorageQueue:
    """Owned by the loop's thread; the threads only run store calls."""

    def __init__(self, num_threads: int) -> None:
        self._finished: deque[IoTask] = deque()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open_tasks: set[IoTask] = set()
        self._open_reads: set[IoTask] = set()
        self._last_progress_s = time.monotonic()
        self._lanes = {name: _Lane(name) for name in ("read", "write")}
        for lane in self._lanes.values():
            self._start_threads(lane, num_threads)

    def fileno(self) -> int:
        """Readable while finished tasks wait for ``drain``."""
        return self._event_fd

    @property
    def read_queue_tokens(self) -> int:
        """Tokens of reads that have not ended."""
        return sum(task.num_tokens for task in self._open_reads)

    @property
    def num_open(self) -> int:
        return len(self._open_tasks)

    @property
    def num_open_writes(self) -> int:
        return len(self._open_tasks) - len(self._open_reads)

    def submit_read(self, task: IoTask) -> None:
        """Queue a read."""
        self._open_reads.add(task)
        self._submit("read", task)

    def submit_write(self, task: IoTask) -> None:
        """Queue a write, a removal or a scan."""
        self._submit("write", task)

    def drain(self) -> None:
        """Run ``done`` of every finished task."""
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            return
        while self._finished:
            task = self._finished.popleft()
            self._open_tasks.discard(task)
            self._open_reads.discard(task)
            self._last_progress_s = time.monotonic()
            task.done(task)

    def stalled_reads(self, now_s: float, deadline_s: float) -> list[IoTask]:
        """Reads that make no progress: running too long, or queued while nothing at all ends."""
        all_stalled = now_s - self._last_progress_s > deadline_s
        return [
            task
            for task in self._open_reads
            if (all_stalled if task.started_s is None else now_s - task.started_s > deadline_s)
        ]

    def close(self) -> None:
        """Finish what is queued and join. Raises ``TransferTimeout`` if a call does not end."""
        for lane in self._lanes.values():
            for _ in lane.threads:
                lane.tasks.put(None)
        deadline = time.monotonic() + _JOIN_S
        for lane in self._lanes.values():
            for thread in lane.threads:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    raise TransferTimeout(f"thread {thread.name} did not end in {_JOIN_S} s")
        self.drain()
        os.close(self._event_fd)

    def _submit(self, lane: str, task: IoTask) -> None:
        if not self._open_tasks:
            self._last_progress_s = time.monotonic()
        self._open_tasks.add(task)
        self._lanes[lane].tasks.put(task)

    def _start_threads(self, lane: _Lane, num_threads: int) -> None:
        for idx in range(num_threads):
            thread = threading.Thread(
                target=self._work, args=(lane,), name=f"dualpath-{lane.name}-{idx}", daemon=True
            )
            lane.threads.append(thread)
            thread.start()

    def _work(self, lane: _Lane) -> None:
        while (task := lane.tasks.get()) is not None:
            if not task.cancelled:
                self._run(task)
            self._finished.append(task)
            os.eventfd_write(self._event_fd, 1)

    @staticmethod
    def _run(task: IoTask) -> None:
        task.started_s = time.monotonic()
        try:
            task.num_bytes = task.call()
        except StorageError as exc:
            task.error = exc
        except Exception as exc:
            logger.exception("mover: a store call failed unexpectedly")
            task.error = StorageError(f"unexpected {type(exc).__name__}: {exc}")
