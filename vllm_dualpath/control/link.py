"""The engine's end of the Unix socket to its mover.

vLLM's hooks must never wait, so they only append to a queue; one thread of our own does the
talking.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from vllm_dualpath.control.framing import FramedSocket
from vllm_dualpath.errors import DualPathError, IncompatiblePeer, TransferTimeout
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Attach,
    Attached,
    EngineMessage,
    LocalMessage,
    decode_local_message,
    encode,
)

_CONNECT_RETRY_S = 0.02
_JOIN_S = 5.0


class EngineLink:
    """Connection of one engine process to its mover; owns the thread ``dualpath-link-<kind>``.

    ``on_message`` and ``on_close`` run in that thread and must be quick. ``on_close`` runs once,
    with the reason, unless ``close`` came first.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        on_message: Callable[[LocalMessage], None],
        on_close: Callable[[str], None],
    ) -> None:
        self._path = path
        self._kind = kind
        self._on_message = on_message
        self._on_close = on_close
        self._outgoing: deque[bytes] = deque()
        self._wake_fd = -1
        self._wake_lock = threading.Lock()
        self._closing = threading.Event()
        self._open = False
        self._thread: threading.Thread | None = None

    @property
    def is_open(self) -> bool:
        """Whether messages can still reach the mover."""
        return self._open

    def connect(self, timeout_s: float) -> tuple[Attached, list[int]]:
        """Connect, attach, start the thread; return the mover's answer and its descriptors.

        Waits for a mover that is still starting. Raises ``TransferTimeout``, ``PeerLost`` or
        ``IncompatiblePeer``. Not for hooks: call it at start or in a thread of your own.
        """
        deadline = time.monotonic() + timeout_s
        framed = FramedSocket(self._connect_socket(deadline))
        try:
            attached, rest = self._attach(framed, deadline)
        except BaseException:
            framed.close()
            raise
        fds = framed.take_fds()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open = True
        for message in rest:
            self._on_message(message)
        self._thread = threading.Thread(
            target=self._run, args=(framed,), name=f"dualpath-link-{self._kind}", daemon=True
        )
        self._thread.start()
        return attached, fds

    def send(self, *messages: EngineMessage) -> bool:
        """Queue messages; never blocks. False: the mover is gone, nothing was queued."""
        if not self._open:
            return False
        self._outgoing.extend([encode(each) for each in messages])
        self._wake()
        return True

    def close(self) -> None:
        """Send what is queued, close and join the thread. Raises ``TransferTimeout`` if it
        stays.
        """
        if self._thread is None or self._closing.is_set():
            return
        self._closing.set()
        self._open = False
        self._wake()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            raise TransferTimeout(f"thread {self._thread.name} did not end in {_JOIN_S} s")
        with self._wake_lock:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _wake(self) -> None:
        # Under a lock: a descriptor closed between look and write may be somebody else's by then.
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _connect_socket(self, deadline: float) -> socket.socket:
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(self._path))
                return sock
            except OSError as exc:
                sock.close()
                if time.monotonic() > deadline:
                    raise TransferTimeout(
                        f"mover at {self._path} did not listen in time ({exc}); see its log"
                    ) from exc
            time.sleep(_CONNECT_RETRY_S)

    def _attach(self, framed: FramedSocket, deadline: float) -> tuple[Attached, list[LocalMessage]]:
        framed.send(encode(Attach(PROTOCOL_VERSION, self._kind, os.getpid())))
        received: list[LocalMessage] = []
        poller = select.poll()  # select() takes no descriptor beyond 1023, and servers have more
        poller.register(framed, select.POLLIN)
        while not received:
            if not poller.poll(1e3 * max(0.0, deadline - time.monotonic())):
                raise TransferTimeout(f"mover at {self._path} did not answer Attach in time")
            received = [decode_local_message(payload) for payload in framed.receive()]
        attached = received[0]
        if not isinstance(attached, Attached) or attached.version != PROTOCOL_VERSION:
            raise IncompatiblePeer(
                f"mover at {self._path}: expected Attached version {PROTOCOL_VERSION},"
                f" found {attached!r}"
            )
        return attached, received[1:]

    def _run(self, framed: FramedSocket) -> None:
        reason = "closed by this side"
        try:
            self._serve(framed)
        except DualPathError as exc:
            reason = str(exc)
        finally:
            self._open = False
            framed.close()
        if not self._closing.is_set():
            self._on_close(reason)

    def _serve(self, framed: FramedSocket) -> None:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        while True:
            self._send_queued(framed)
            if self._closing.is_set() and not framed.wants_write:
                return
            events = select.POLLIN | (select.POLLOUT if framed.wants_write else 0)
            poller.register(framed, events)
            for fd, _ in poller.poll():
                if fd == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                else:
                    for payload in framed.receive():
                        self._on_message(decode_local_message(payload))

    def _send_queued(self, framed: FramedSocket) -> None:
        while self._outgoing:
            framed.send(self._outgoing.popleft())
        framed.flush()
