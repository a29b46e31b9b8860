"""Length-prefixed messages, and file descriptors, over a Unix stream socket."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence

from vllm_dualpath.errors import PeerLost, ProtocolError
from vllm_dualpath.messages import MAX_MESSAGE_BYTES

_LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 256 << 10
_MAX_FDS = 8
_MAX_READS = 64
"""Reads of one ``receive``: a sender that never pauses must not hold the owner up."""


class FramedSocket:
    """A non-blocking framed socket. One owner thread; it never blocks and never spins.

    The owner polls ``fileno()`` for reading always, and for writing while ``wants_write`` is true.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._received = bytearray()
        self._fds: list[int] = []
        self._outgoing: deque[tuple[memoryview, tuple[int, ...]]] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """Bytes wait for the socket to take them."""
        return bool(self._outgoing)

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Queue one message and send what the socket takes now. Raises ``PeerLost``.

        The descriptors are duplicated by the kernel when the first byte leaves.
        """
        frame = memoryview(_LENGTH.pack(len(payload)) + payload)
        self._outgoing.append((frame, tuple(fds)))
        self.flush()

    def flush(self) -> None:
        """Send queued bytes until the socket would block. Raises ``PeerLost``."""
        while self._outgoing:
            frame, fds = self._outgoing[0]
            try:
                sent = (
                    socket.send_fds(self._socket, [frame], list(fds))
                    if fds
                    else (self._socket.send(frame))
                )
            except BlockingIOError:
                return
            except OSError as exc:
                raise PeerLost(f"local socket: sending failed: {exc}") from exc
            if sent == len(frame):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = (frame[sent:], ())

    def receive(self) -> list[bytes]:
        """Return every whole message that has arrived. Raises ``PeerLost`` at the end of the
        stream.
        """
        closed = not self._fill()
        messages = list(self._split())
        if closed and not messages:
            raise PeerLost("local socket: closed by the other side")
        return messages

    def take_fds(self) -> list[int]:
        """Descriptors received so far; the caller owns them."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)
        self._socket.close()

    def _fill(self) -> bool:
        """Read what is there; false when the stream has ended."""
        for _ in range(_MAX_READS):
            try:
                data, ancillary, _, _ = self._socket.recvmsg(
                    _RECEIVE_BYTES,
                    socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                return True
            except ConnectionResetError:
                # The other side left without reading all; what it sent before still counts.
                return False
            except OSError as exc:
                raise PeerLost(f"local socket: receiving failed: {exc}") from exc
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds = array.array("i")
                    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                    self._fds.extend(fds)
            if not data:
                return False
            self._received += data
        return True

    def _split(self) -> list[bytes]:
        messages = []
        start = 0
        while len(self._received) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, start)
            if length > MAX_MESSAGE_BYTES:
                raise ProtocolError(
                    f"local socket: message of {length} bytes, at most {MAX_MESSAGE_BYTES}"
                )
            end = start + _LENGTH.size + length
            if len(self._received) < end:
                break
            messages.append(bytes(self._received[start + _LENGTH.size : end]))
            start = end
        del self._received[:start]
        return messages
