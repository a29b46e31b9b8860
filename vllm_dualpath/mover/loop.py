"""The mover's event loop: descriptors, ZeroMQ sockets and timers on one thread.

It blocks in poll until something happens; with nothing to do it uses no CPU.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import zmq

logger = logging.getLogger(__name__)

Callback = Callable[[], None]


class HasFileno(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int: ...


class Timer:
    """A pending call; ``cancel`` forgets it."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback | None) -> None:
        self.callback = callback

    def cancel(self) -> None:
        self.callback = None


class EventLoop:
    """One owner thread. Callbacks must not block; one that raises is our bug and is logged.

    ``stop`` may also be called from another thread or a signal handler.
    """

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._callbacks: dict[Any, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._counter = itertools.count()
        self._stopped = False
        # Poll goes on waiting after a signal handler has run: only a descriptor ends it.
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake_fd, zmq.POLLIN)

    def now_s(self) -> float:
        return time.monotonic()

    def watch(self, source: HasFileno | zmq.Socket[bytes], callback: Callback) -> None:
        """Call ``callback`` whenever ``source`` is readable."""
        key = source if isinstance(source, zmq.Socket) else source.fileno()
        self._callbacks[key] = callback
        self._poller.register(key, zmq.POLLIN)

    def want_write(self, source: HasFileno | zmq.Socket[bytes], wanted: bool) -> None:
        """Also wake the callback when ``source`` can take bytes."""
        key = source if isinstance(source, zmq.Socket) else source.fileno()
        if key in self._callbacks:
            self._poller.register(key, zmq.POLLIN | (zmq.POLLOUT if wanted else 0))

    def unwatch(self, source: HasFileno | zmq.Socket[bytes]) -> None:
        """Stop watching; harmless when not watched."""
        key = source if isinstance(source, zmq.Socket) else source.fileno()
        if self._callbacks.pop(key, None) is not None:
            self._poller.unregister(key)

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """Call once, ``delay_s`` from now."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.now_s() + delay_s, next(self._counter), timer))
        return timer

    def run(self) -> None:
        """Serve until ``stop``."""
        while not self._stopped:
            self.run_once()

    def run_once(self) -> None:
        """Wait for something to happen and serve it."""
        for key, _ in self._poller.poll(self._poll_ms()):
            callback = self._callbacks.get(key)
            if callback is not None:
                self.guard(callback)
        self._run_timers()

    def finish(self, is_done: Callable[[], bool], timeout_s: float) -> None:
        """After ``run``, once: serve on until ``is_done``, at most ``timeout_s``."""
        # ``stop`` has made it readable for good.
        self._poller.unregister(self._wake_fd)
        ends_s = self.now_s() + timeout_s
        while not is_done() and (left_s := ends_s - self.now_s()) > 0:
            timer = self.call_later(left_s, _nothing)
            self.run_once()
            timer.cancel()

    def guard(self, callback: Callback) -> None:
        """Call; log what it raises. For sources that hand out several events at a time: one that
        fails must not lose the others.
        """
        try:
            callback()
        except Exception:
            logger.exception("mover: a callback failed; this is a bug, please report it")

    def stop(self) -> None:
        """End ``run`` after the current callback."""
        self._stopped = True
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Let go of the descriptor that ``stop`` writes to."""
        os.close(self._wake_fd)

    def _poll_ms(self) -> int | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        # Rounded up: waking a moment early would make the loop spin until the timer is due.
        return max(0, int((self._timers[0][0] - self.now_s()) * 1000) + 1)

    def _run_timers(self) -> None:
        now = self.now_s()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                self.guard(timer.callback)


def _nothing() -> None:
    """Only ends a wait."""
