"""Blocking calls on a few threads of their own, their ends on the loop's."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vllm_dualpath.errors import StorageError, TransferTimeout
from vllm_dualpath.mover.loop import EventLoop

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Call:
    """``ended`` runs once, on the loop's thread, also when cancelled."""

    run: Callable[[], int]
    """Returns a number of bytes; may raise ``StorageError``."""
    ended: Callable[[Call], None]
    cancelled: bool = False
    """Never started."""
    started_s: float | None = None
    num_bytes: int = 0
    error: StorageError | None = None
    threads: CallThreads | None = None
    """Those it was submitted to."""


class CallThreads:
    """Owned by the loop's thread; its threads only run the calls, oldest first."""

    def __init__(self, name: str, num_threads: int, loop: EventLoop) -> None:
        self._loop = loop
        self._waiting: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._finished: deque[Call] = deque()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._start_lock = threading.Lock()
        """A call is either started or cancelled, never both."""
        self._threads = [
            threading.Thread(target=self._work, name=f"dualpath-{name}-{idx}", daemon=True)
            for idx in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        loop.watch(self, self.drain)

    def fileno(self) -> int:
        """Readable while finished calls wait for ``drain``."""
        return self._event_fd

    @property
    def num_waiting(self) -> int:
        """Calls that no thread has taken; approximate."""
        return self._waiting.qsize()

    def submit(self, call: Call) -> None:
        """Run it when a thread is free."""
        call.threads = self
        self._waiting.put(call)

    def cancel(self, call: Call) -> bool:
        """End a call that has not started, without waiting for its turn; False if it has."""
        with self._start_lock:
            if call.started_s is not None or call.cancelled:
                return False
            call.cancelled = True
        self._finish(call)
        return True

    def drain(self) -> None:
        """Run ``ended`` of every finished call."""
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            return
        while self._finished:
            call = self._finished.popleft()
            self._loop.guard(partial(call.ended, call))

    def close(self, deadline_s: float) -> None:
        """Run what waits, then end. Raises ``TransferTimeout`` if a call has not ended by then
        (``time.monotonic``).
        """
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                raise TransferTimeout(f"thread {thread.name}: a call did not end in time")
        self.drain()
        self._loop.unwatch(self)
        os.close(self._event_fd)

    def _finish(self, call: Call) -> None:
        self._finished.append(call)
        os.eventfd_write(self._event_fd, 1)

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            with self._start_lock:
                if call.cancelled:
                    continue
                call.started_s = time.monotonic()
            self._run(call)
            self._finish(call)

    @staticmethod
    def _run(call: Call) -> None:
        try:
            call.num_bytes = call.run()
        except StorageError as exc:
            call.error = exc
        except Exception as exc:
            logger.exception("mover: a store call failed unexpectedly")
            call.error = StorageError(f"unexpected {type(exc).__name__}: {exc}")
