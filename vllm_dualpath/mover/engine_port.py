"""The mover's end of the Unix socket: its engine's worker and scheduler sides attach here."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vllm_dualpath.control.framing import FramedSocket
from vllm_dualpath.errors import ConfigError, DualPathError, PeerLost, ProtocolError
from vllm_dualpath.messages import (
    PROTOCOL_VERSION,
    Attach,
    Attached,
    EngineMessage,
    LocalMessage,
    decode_engine_message,
    encode,
)
from vllm_dualpath.mover.counters import Counters
from vllm_dualpath.mover.loop import EventLoop

logger = logging.getLogger(__name__)

_BACKLOG = 8
_KINDS = ("worker", "scheduler")


class EnginePort:
    """Accepts connections, answers ``Attach``, hands on the rest.

    A message that raises ``ProtocolError`` is counted and dropped; the connection stays. When an
    attached connection closes, the engine is gone or going: ``on_gone`` is called.
    """

    def __init__(
        self,
        path: Path,
        loop: EventLoop,
        counters: Counters,
        attached: Callable[[], tuple[Attached, list[int]]],
        on_attached: Callable[[str], None],
        on_message: Callable[[EngineMessage], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._path = path
        self._loop = loop
        self._counters = counters
        self._attached = attached
        self._on_attached = on_attached
        self._on_message = on_message
        self._on_gone = on_gone
        self._connections: dict[FramedSocket, str] = {}
        self._listener = self._listen()
        self._inode = path.stat().st_ino
        loop.watch(self._listener, self._accept)

    def send(self, kind: str, message: LocalMessage) -> bool:
        """Send to the engine's ``kind`` side; false when it is not attached."""
        for connection, attached_kind in list(self._connections.items()):
            if attached_kind == kind:
                self._send(connection, encode(message))
                return True
        return False

    @property
    def has_worker(self) -> bool:
        return "worker" in self._connections.values()

    def close(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        self._loop.unwatch(self._listener)
        self._listener.close()
        self._remove_socket()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The engine's lock file guarantees one mover an engine; what is left here is a dead one's.
        self._path.unlink(missing_ok=True)
        try:
            listener.bind(str(self._path))
        except OSError as exc:
            raise ConfigError(
                f"runtime_dir: cannot listen on {self._path} ({exc}); check the directory"
            ) from exc
        self._path.chmod(0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        return listener

    def _remove_socket(self) -> None:
        """Unless the engine's next mover listens there already."""
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except FileNotFoundError:
            logger.debug("socket %s is gone already", self._path)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        connection = FramedSocket(sock)
        self._connections[connection] = ""
        self._loop.watch(connection, partial(self._serve, connection))

    def _serve(self, connection: FramedSocket) -> None:
        try:
            # Read first: what an engine sent before it went still counts.
            for payload in connection.receive():
                self._handle(connection, payload)
            connection.flush()
        except DualPathError as exc:
            self._counters.rejected_messages += isinstance(exc, ProtocolError)
            kind = self._drop(connection)
            if kind:
                self._on_gone(f"{kind} side: {exc}")
            return
        self._loop.want_write(connection, connection.wants_write)

    def _handle(self, connection: FramedSocket, payload: bytes) -> None:
        try:
            message = decode_engine_message(payload)
            if isinstance(message, Attach):
                self._attach(connection, message)
            elif not self._connections[connection]:
                raise ProtocolError("first message is not Attach")
            else:
                self._on_message(message)
        except ProtocolError as exc:
            self._counters.rejected_messages += 1
            logger.warning("engine message rejected: %s", exc)

    def _attach(self, connection: FramedSocket, attach: Attach) -> None:
        if attach.version != PROTOCOL_VERSION or attach.kind not in _KINDS:
            raise ProtocolError(
                f"attach: expected version {PROTOCOL_VERSION} and one of {_KINDS}, found {attach}"
            )
        if attach.kind in self._connections.values():
            raise PeerLost(f"a second {attach.kind} side attached")
        answer, fds = self._attached()
        self._connections[connection] = attach.kind
        try:
            connection.send(encode(answer), fds)
        finally:
            for fd in fds:
                os.close(fd)
        logger.info("%s side attached, pid %d", attach.kind, attach.pid)
        self._on_attached(attach.kind)

    def _send(self, connection: FramedSocket, payload: bytes) -> None:
        try:
            connection.send(payload)
            self._loop.want_write(connection, connection.wants_write)
        except PeerLost as exc:
            # The read side will see the end of the stream and report it.
            logger.debug("engine gone while sending: %s", exc)

    def _drop(self, connection: FramedSocket) -> str:
        kind = self._connections.pop(connection, "")
        self._loop.unwatch(connection)
        connection.close()
        return kind
